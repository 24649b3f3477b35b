"""Tables of the development splits from ``results/development/``, for ``docs/development.md``.

    python DevelopmentReport.py            # write the tables
    python DevelopmentReport.py --check    # write nothing; fail if a table is not current

Nothing here trains. ``Development.py`` and ``CueStrength.py`` obtain the results.
"""

import itertools
import re
from numbers import Real
from pathlib import Path

import numpy as np

from Arms import PROFILES
from Documents import NOT_RUN, report_parser, run_report
from Methods import METHODS
from Results import HARDWARE, read_json
from Runtime import hardware_text
from Utils import markdown_table

FOLDER = Path("results", "development")
CUES = FOLDER / "cues"
BUDGET_FOLDER = re.compile(r"width(\d+)-steps(\d+)")  # of a budget that is no profile of the study
DOCUMENT = Path("docs", "development.md")
SCORES = ("recall", "precision", "f1", "accuracy")
RUN = {  # what is asked of a result, see Results.read_json
    "method": str, "what": str, "split": str, "seed": int, "validation": dict.fromkeys(SCORES, Real),
    "recipe": dict, "hardware": HARDWARE,
}  # fmt: skip
CUE = {
    "sampler": str, "method": str, "split": str, "seed": int, "auc": Real, "configuration": dict,
}  # fmt: skip


def methods_table(folder):
    """Markdown tables of all finished runs of a budget: mean scores of each method, the best F1 first.

    Only means over the same splits and seeds may be compared, so each set of them has a table of its own, the
    largest first. It has every method that was run on all of them.

    Parameters
    ----------
    folder : path
        Such as ``results/development/width16-steps2000``.

    Returns
    -------
    str
    """
    runs = {}
    for result in _read_runs(folder):
        runs.setdefault(result["method"], []).append(result)
    tables = {_where(results): [] for results in runs.values()}
    for (where, rows), (name, results) in itertools.product(tables.items(), runs.items()):
        results = [result for result in results if _where([result]) in where.split(", ")]
        if _where(results) != where:
            continue
        means = {key: np.mean([result["validation"][key] for result in results]) for key in SCORES}
        scores = [f"{100 * means[key]:.1f}" for key in SCORES]
        what = METHODS[name].what if name in METHODS else results[0]["what"]
        rows.append((-means["f1"], (f"`{name}`: {what}", *scores)))
    head = ("method", "minority recall", "minority precision", "minority F1", "balanced accuracy")
    return "\n\n".join(
        f"Means over {where}:\n\n{markdown_table(head, [row for _, row in sorted(rows)])}"
        for where, rows in sorted(tables.items(), key=lambda item: (-item[0].count(","), item))
    )


def cue_table():
    """Markdown table of the cues: how well added images are told from real ones, and the recall of training on them.

    The recall is the mean over the splits and seeds on which the cue was measured; empty if one of them is missing.
    """
    cues = {}
    for path in sorted(CUES.glob("*/*.json")):
        result = read_json(path, CUE)
        cues.setdefault(result["sampler"], []).append(result)
    folders = _folders()
    recalls = {
        (folder.name, run["method"], run["split"], run["seed"]): run["validation"]["recall"]
        for folder in folders
        for run in _read_runs(folder)
    }
    recall_of = {}  # (images, folder) -> the cell
    for (name, results), folder in itertools.product(cues.items(), folders):
        keys = [(folder.name, result["method"], result["split"], result["seed"]) for result in results]
        if all(key in recalls for key in keys):
            recall_of[name, folder] = f"{100 * np.mean([recalls[key] for key in keys]):.1f}"
    folders = [folder for folder in folders if any((name, folder) in recall_of for name in cues)]
    rows = []
    for name, results in cues.items():
        cells = [recall_of.get((name, folder), "") for folder in folders]
        auc = np.mean([result["auc"] for result in results])
        rows.append((-auc, (name, f"{auc:.3f}", f"`{results[0]['method']}`", *cells, _where(results))))
    head = (
        "images",
        "AUC of the cue",
        "method",
        *(f"recall (%). {_describe(folder)}" for folder in folders),
        "split and seed",
    )
    return markdown_table(head, [row for _, row in sorted(rows)])


def _folders():
    """The folders of all budgets that were used, first those that are no profile of the study."""
    profiles = [FOLDER / name for name in PROFILES]
    others = sorted(folder for folder in FOLDER.glob("*") if BUDGET_FOLDER.fullmatch(folder.name))
    return [folder for folder in others + profiles if any(folder.glob("*/*-seed*.json"))]


def _describe(folder):
    """The budget of a folder in words."""
    if folder.name not in PROFILES:
        width, steps = BUDGET_FOLDER.fullmatch(folder.name).groups()
        return f"Width {width}, {int(steps):,} training steps"
    profile = PROFILES[folder.name]
    filters = ", filters in mirrored pairs" if profile.mirrored else ""
    return f"Profile `{folder.name}`: width {profile.width}{filters}, {profile.steps:,} training steps"


def _read_runs(folder):
    return [read_json(path, RUN) for path in sorted(Path(folder).glob("*/*-seed*.json"))]


def _where(results):
    return ", ".join(sorted(f"{result['split']} seed {result['seed']}" for result in results))


def generated_parts():
    """Name of each generated part of ``docs/development.md`` -> its text."""
    methods = []
    for folder in _folders():
        hardware = sorted({hardware_text(run["hardware"]) for run in _read_runs(folder)})
        methods.append(
            f"{_describe(folder)}, {'; '.join(hardware)}. Scores on validation images in percent.\n\n"
            f"{methods_table(folder)}"
        )
    cues = cue_table() if CUES.exists() else NOT_RUN
    return {"methods": "\n\n".join(methods) or NOT_RUN, "cues": cues}


def main(arguments=None):
    parser = report_parser("Tables of docs/development.md from results/development/.")
    run_report(parser, parser.parse_args(arguments).check, lambda: {DOCUMENT: generated_parts()})


if __name__ == "__main__":
    main()
