"""Write the tables of ``benchmarks/README.md`` from ``results/benchmarks/``.

    python benchmarks/report.py            # write
    python benchmarks/report.py --check    # fail if the file does not show what the results say

A part whose benchmark was not run yet says so.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import classifier
import gan
import profile_training
import stable_diffusion
import time_to_accuracy

from Report import NOT_RUN, with_section
from Runtime import atomic_path

README = Path("benchmarks", "README.md")


def _from_files(paths, table):
    tables = [table(json.loads(path.read_text(encoding="utf-8"))) for path in paths if path.exists()]
    return "\n\n".join(tables) or NOT_RUN


def sections():
    """Name of each generated part of the README -> its text."""
    profiles = sorted(profile_training.FOLDER.glob("profile-width*.json"))
    return {
        "speed": _from_files(sorted(classifier.FOLDER.glob("classifier-*.json")), classifier.table),
        "parts": profile_training.table([json.loads(p.read_text()) for p in profiles])
        if profiles
        else NOT_RUN,
        **{
            series: time_to_accuracy.table(series) if time_to_accuracy.load_runs(series) else NOT_RUN
            for series in time_to_accuracy.SERIES
        },
        "gan": _from_files([gan.PATH], gan.table),
        "stable-diffusion": _from_files([Path(stable_diffusion.RESULT)], stable_diffusion.table),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Tables of benchmarks/README.md from results/benchmarks/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not current")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    current = text
    for name, section in sections().items():
        current = with_section(current, name, section)
    if not options.check:
        with atomic_path(README) as temporary:
            temporary.write_text(current, encoding="utf-8")
    elif current != text:
        parser.exit(1, f"{README} does not show what the results say. Run 'make report' and commit.\n")


if __name__ == "__main__":
    main()
