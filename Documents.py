"""Generated parts of documents: what stands between two markers is written by a program and checked by another run of it.

<!-- summary:begin (generated) -->
<!-- summary:end -->

update_documents({Path("README.md"): {"summary": table}}, check=False)

A program that writes such parts is two calls:

parser = report_parser("Tables of README.md from results/.")
run_report(parser, parser.parse_args().check, lambda: {Path("README.md"): {"summary": table}})
"""

import argparse
from pathlib import Path

from Files import atomic_path

NOT_RUN = "*Not run yet.*"


def with_part(text, name, part):
    """``text`` with everything between the two markers ``name`` replaced by ``part``.

    Raises
    ------
    ValueError
        If the markers are missing or occur more than once.
    """
    begin, end = f"<!-- {name}:begin (generated) -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"There must be one line {begin!r} and one {end!r}.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"


def update_documents(documents, check):
    """Write the generated parts into their documents, or only say which documents are not current.

    Parameters
    ----------
    documents : dict
        Path -> name of each generated part -> its text.
    check : bool
        Whether to write nothing.

    Returns
    -------
    list of path
        The documents that were not current.

    Raises
    ------
    FileNotFoundError
        If a document is not in the working directory.
    """
    changed = []
    for path, parts in documents.items():
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path} in {Path.cwd()}. Run this from the repository's folder."
            )
        text = current = path.read_text(encoding="utf-8")
        for name, part in parts.items():
            current = with_part(current, name, part)
        if current != text:
            changed.append(path)
            if not check:
                with atomic_path(path) as temporary:
                    temporary.write_text(current, encoding="utf-8")
    return changed


def report_parser(description):
    """The command line of a program that writes generated parts: an ``argparse.ArgumentParser`` with ``--check``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a document is not current"
    )
    return parser


def run_report(parser, check, documents, draw=None):
    """Write the generated parts and draw the pictures, or check that the documents are current.

    The program ends with status 1 and one line if results cannot be read or written, or a document is not current.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        See :func:`report_parser`.
    check : bool
        Whether to write nothing.
    documents : callable
        Called without arguments, returns what :func:`update_documents` takes.
    draw : callable, optional
        Called without arguments after the documents are written, saves the pictures. Not called for a check.
    """
    try:
        changed = update_documents(documents(), check)
        if draw is not None and not check:
            draw()
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if check and changed:
        names = " and ".join(map(str, changed))
        parser.exit(1, f"What results/ says is not in {names}. Run 'make report' and commit.\n")
    if check:
        print("The documents show what results/ says.")
