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
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync

from Arms import PROFILES, resolve_profile
from BusyMachine import passive_waiting
from DeviceFaults import first_line
from Files import atomic_path
from ImbalancedCIFAR10 import load_data

NOTEBOOKS = ("Main.ipynb", "GAN_Main.ipynb", "GAN_Classification.ipynb")
MOST_BYTES = 1_000_000  # an executed notebook stays small enough to be read on the web
PROGRESS_HINT = "ignore:IProgress not found"


class Kernel:
    """A Jupyter kernel that imports the study's modules, which takes seconds, while this program goes on.

    It is the kernel of this environment, whatever kernel a notebook was last saved with.

    Attributes
    ----------
    manager : jupyter_client.AsyncKernelManager
    """

    def __init__(self):
        self.manager = AsyncKernelManager(kernel_name="python3")
        # Without the argument it warns about connections inside this machine.
        run_sync(self.manager.start_kernel)(extra_arguments=["--log-level=ERROR"])
        self._client = self.manager.blocking_client()
        self._client.start_channels()
        # If this fails, the notebook's own import says why.
        self._client.execute("import Experiment, Report", silent=True)

    def stop(self):
        self._client.stop_channels()
        run_sync(self.manager.shutdown_kernel)(now=True)


def run_notebooks(names, profile_name, data_name):
    """Execute several notebooks in order. While one runs, the kernel of the next one imports.

    Parameters
    ----------
    names : sequence of str
    profile_name, data_name
        See :func:`run_notebook`, also for the errors.
    """
    # Without this, a library's hint about progress bars and its path on this machine would be in the copies.
    warnings_of_user = os.environ.get("PYTHONWARNINGS", "")
    if PROGRESS_HINT not in warnings_of_user:
        os.environ["PYTHONWARNINGS"] = f"{warnings_of_user},{PROGRESS_HINT}".lstrip(",")
    following = Kernel()
    try:
        for name in names:
            kernel, following = following, Kernel() if name != names[-1] else None
            print(f"Executing {name} ...", flush=True)
            try:
                print(f"Executed copy: {run_notebook(name, profile_name, data_name, kernel)}", flush=True)
            finally:
                kernel.stop()
    finally:
        if following is not None:
            following.stop()


def run_notebook(name, profile_name, data_name, kernel):
    """Execute one notebook and return the path of the executed copy.

    Parameters
    ----------
    name : str
        Path of the notebook. It takes the papermill parameter ``profile``.
    profile_name : str
        A key of :data:`Arms.PROFILES`.
    data_name : str
        Part of the copy's file name unless it is ``"cifar10"``.
    kernel : Kernel
        Not used before.

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
        reason = first_line(error)
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
                kernel_name="python3", language="python", km=kernel.manager,
                start_timeout=600,  # of the imports, which a slow disk can make long
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            temporary.replace(failed)
            raise RuntimeError(
                f"A cell of {name} failed with {error.ename}: {error.evalue} The notebook up to this cell is {failed}."
            ) from error
        # papermill notes the temporary path, which means nothing to others.
        notebook.metadata.papermill["output_path"] = str(output)
        for cell in notebook.cells:  # the copy lies two folders deeper
            if cell.cell_type == "markdown":
                cell.source = cell.source.replace("](docs/", "](../../docs/")
        nbformat.write(notebook, temporary)
        if temporary.stat().st_size > MOST_BYTES:
            temporary.replace(failed)
            raise RuntimeError(f"{output} would have more than {MOST_BYTES:,} bytes. It is kept as {failed}.")
    failed.unlink(missing_ok=True)  # of an earlier run
    return output


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Execute the notebooks of the study in order.")
    parser.add_argument("--profile", default="auto", help=f"auto (default), {', '.join(PROFILES)}")
    options = parser.parse_args(arguments)
    try:
        profile_name, profile = resolve_profile(options.profile)
        if profile.arms is not None:
            raise ValueError(
                f"The profile {profile_name} runs the arms {', '.join(profile.arms)} only, but the notebooks walk "
                f"through others. Run these with: python Experiment.py --profile {profile_name}"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            data = load_data()
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if data.name != "cifar10":
        line = "*" * 100
        print(f"{line}\n{caught[-1].message}\n{line}", flush=True)
    print(f"Profile {profile_name}: {profile.purpose}.", flush=True)
    os.environ |= passive_waiting()  # for the kernels; PyTorch is loaded here already
    try:
        run_notebooks(NOTEBOOKS, profile_name, data.name)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
