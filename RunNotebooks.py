"""Execute the study's notebooks in order, as ``make main`` does.

    python RunNotebooks.py --profile auto

The executed copies go to ``results/<profile>/``. The notebooks themselves stay without output.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import nbformat
import papermill

from Arms import PROFILES, resolve_profile
from ImbalancedCIFAR10 import load_data
from Runtime import atomic_path

NOTEBOOKS = ("Main.ipynb", "GAN_Main.ipynb", "GAN_Classification.ipynb")
MOST_BYTES = 1_000_000  # an executed notebook stays small enough to be read on the web


def run_notebook(name, profile_name, data_name):
    """Execute one notebook and return the path of the executed copy.

    Parameters
    ----------
    name : str
        Path of the notebook. It takes the papermill parameter ``profile``.
    profile_name : str
        A key of :data:`Arms.PROFILES`.
    data_name : str
        Part of the copy's file name unless it is ``"cifar10"``.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    FileNotFoundError
        If the notebook is not in the working directory.
    ValueError
        If the file is no notebook.
    RuntimeError
        If a cell fails, or the executed notebook is larger than 1 MB. The copy is kept as ``failed-<name>``.
    """
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"There is no {name} in {Path.cwd()}. Run this from the folder that contains the notebooks."
        )
    try:
        nbformat.validate(nbformat.read(name, as_version=4))
    except Exception as error:  # nbformat raises many kinds for what is no notebook
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} is no notebook: {reason[:100]}. Get it again.") from error
    prefix = "" if data_name == "cifar10" else f"{data_name}_"
    output = Path("results", profile_name, prefix + Path(name).name)
    failed = output.with_name(f"failed-{output.name}")
    with atomic_path(output) as temporary:
        try:
            notebook = papermill.execute_notebook(
                name, str(temporary), parameters={"profile": profile_name}, progress_bar=False,
                # Cell output goes to the terminal at once, so that progress bars stay bars. In the copy, the
                # many small pieces of a cell's output are joined.
                stdout_file=sys.stdout, stderr_file=sys.stderr, coalesce_streams=True,
                # The kernel of this environment, whatever kernel the notebook was last saved with.
                kernel_name="python3", language="python",
                extra_arguments=["--log-level=ERROR"],  # no warning about connections inside this machine
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            temporary.replace(failed)
            raise RuntimeError(
                f"A cell of {name} failed with {error.ename}: {error.evalue} The notebook up to this cell is {failed}."
            ) from error
        # papermill notes the temporary path, which means nothing to others.
        notebook.metadata.papermill["output_path"] = str(output)
        nbformat.write(notebook, temporary)
        if temporary.stat().st_size > MOST_BYTES:
            temporary.replace(failed)
            raise RuntimeError(f"{output} would have more than {MOST_BYTES:,} bytes. It is kept as {failed}.")
    return output


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Execute the notebooks of the study in order.")
    parser.add_argument("--profile", default="auto", help=f"auto (default), {', '.join(PROFILES)}")
    options = parser.parse_args(arguments)
    try:
        profile_name, profile = resolve_profile(options.profile)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            data = load_data()
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if data.name != "cifar10":
        line = "*" * 100
        print(f"{line}\n{caught[-1].message}\n{line}", flush=True)
    print(f"Profile {profile_name}: {profile.purpose}.", flush=True)
    # Without this, a library's hint about progress bars and its path on this machine would be in the copies.
    warnings_of_user = os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = f"{warnings_of_user},ignore:IProgress not found".lstrip(",")
    try:
        for name in NOTEBOOKS:
            print(f"Executing {name} ...", flush=True)
            print(f"Executed copy: {run_notebook(name, profile_name, data.name)}", flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
