"""Tables of the development splits from ``results/development/``, for ``docs/development.md``.

    python DevelopmentReport.py            # write the tables
    python DevelopmentReport.py --check    # write nothing; fail if a table is not current

Nothing here trains. ``Development.py`` and ``CueStrength.py`` obtain the results.
"""

import argparse
from numbers import Real
from pathlib import Path

import numpy as np

from Report import NOT_RUN, update_documents
from Results import HARDWARE, read_json
from Runtime import hardware_text
from Utils import markdown_table

FOLDER = Path("results", "development")
CUES = FOLDER / "cues"
DOCUMENT = Path("docs", "development.md")
SCORES = ("recall", "precision", "f1", "accuracy")
RUN = {  # what is asked of a result, see Results.read_json
    "method": str, "what": str, "split": str, "seed": int, "validation": dict.fromkeys(SCORES, Real),
    "recipe": dict, "hardware": HARDWARE,
}  # fmt: skip
CUE = {
    "sampler": str, "method": str | None, "split": str, "seed": int, "auc": Real, "configuration": dict,
}  # fmt: skip


def methods_table(folder):
    """Markdown table of all finished runs of a budget: mean scores of each method, the best F1 first.

    Parameters
    ----------
    folder : path
        Such as ``results/development/width16-steps2000``.

    Returns
    -------
    str
        The methods that were run on the most splits and seeds come first: only their means may be compared.
    """
    runs = {}
    for path in sorted(Path(folder).glob("*/*-seed*.json")):
        result = read_json(path, RUN)
        runs.setdefault(result["method"], []).append(result)
    rows = []
    for name, results in runs.items():
        means = {key: np.mean([result["validation"][key] for result in results]) for key in SCORES}
        scores = [f"{100 * means[key]:.1f}" for key in SCORES]
        rows.append(
            (-len(results), -means["f1"], (f"`{name}`: {results[0]['what']}", *scores, _where(results)))
        )
    head = ("method", "recall", "precision", "F1", "accuracy", "split and seed")
    return markdown_table(head, [row for *_, row in sorted(rows)])


def cue_table():
    """Markdown table of the cues: how well added images are told from real ones, and the recall of training on them."""
    cues, recalls = {}, {}
    for path in sorted(CUES.glob("*/*.json")):
        result = read_json(path, CUE)
        cues.setdefault(result["sampler"], []).append(result)
    for path in sorted(FOLDER.glob("width*/*/*-seed*.json")):
        result = read_json(path, RUN)
        recalls.setdefault((result["method"], path.parts[-3]), []).append(result["validation"]["recall"])
    budgets = sorted({budget for _, budget in recalls})
    rows = []
    for name, results in cues.items():
        auc, method = np.mean([result["auc"] for result in results]), results[0]["method"]
        found = [recalls.get((method, budget)) for budget in budgets]
        cells = [f"{100 * np.mean(recall):.1f}" if recall else "" for recall in found]
        rows.append((name, f"{auc:.3f}", method or "", *cells, _where(results)))
    head = (
        "images",
        "AUC of the cue",
        "method",
        *(f"recall, {budget}" for budget in budgets),
        "split and seed",
    )
    return markdown_table(head, sorted(rows, key=lambda row: -float(row[1])))


def _where(results):
    return ", ".join(sorted(f"{result['split']} {result['seed']}" for result in results))


def generated_parts():
    """Name of each generated part of ``docs/development.md`` -> its text."""
    methods = []
    for folder in sorted(FOLDER.glob("width*-steps*")):
        first = read_json(next(folder.glob("*/*-seed*.json")), RUN)
        width, steps = folder.name.removeprefix("width").split("-steps")
        methods.append(
            f"Width {width}, {int(steps):,} training steps, {hardware_text(first['hardware'])}. Scores on validation "
            f"images in percent:\n\n{methods_table(folder)}"
        )
    cues = cue_table() if CUES.exists() else NOT_RUN
    return {"methods": "\n\n".join(methods) or NOT_RUN, "cues": cues}


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Tables of docs/development.md from results/development/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not current")
    options = parser.parse_args(arguments)
    try:
        changed = update_documents({DOCUMENT: generated_parts()}, options.check)
    except (ValueError, KeyError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if options.check and changed:
        parser.exit(1, f"{DOCUMENT} does not show what {FOLDER} says. Run 'make report' and commit.\n")


if __name__ == "__main__":
    main()
