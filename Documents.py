"""Generated parts of documents: what stands between two markers is written by a program and checked by another run of it.

<!-- summary:begin (generated) -->
<!-- summary:end -->

update_documents({Path("README.md"): {"summary": table}}, check=False)
"""

from pathlib import Path

from Runtime import atomic_path

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
