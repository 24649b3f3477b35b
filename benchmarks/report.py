"""Write the tables of ``benchmarks/README.md`` and ``docs/gpu-and-clusters.md`` from ``results/benchmarks/``.

    python benchmarks/report.py            # write the tables
    python benchmarks/report.py --check    # write nothing; fail if a table is not current

A table whose benchmark has not been run yet reads "Not run yet".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import classifier
import estimate
import gan
import operators
import profile_training
import side_by_side
import stable_diffusion
import time_to_accuracy

from Documents import NOT_RUN, report_parser, run_report
from Results import read_json

README = Path("benchmarks", "README.md")


def _read(paths, shape=None):
    return [read_json(path, shape) for path in paths if path.exists()]


def _tables(paths, table, shape=None):
    return "\n\n".join(map(table, _read(paths, shape))) or NOT_RUN


def generated_parts():
    """Name of each generated part of the README -> its text, made from ``results/benchmarks/``."""
    profiles = _read(sorted(profile_training.FOLDER.glob("profile-*-width*.json")), profile_training.RECORD)
    return {
        "speed": _tables(
            sorted(classifier.FOLDER.glob("classifier-*.json")), classifier.table, classifier.RECORD
        ),
        "parts": profile_training.table(profiles) if profiles else NOT_RUN,
        "operators": _tables([operators.RESULT], operators.table),
        "side-by-side": _tables([side_by_side.RESULT], side_by_side.sentence),
        **{
            series: time_to_accuracy.table(series) if time_to_accuracy.load_runs(series) else NOT_RUN
            for series in time_to_accuracy.SERIES
        },
        "gan": _tables(sorted(gan.FOLDER.glob("gan-*.json")), gan.table, gan.RECORD),
        "stable-diffusion": _tables(
            [Path(stable_diffusion.RESULT)], stable_diffusion.table, stable_diffusion.RECORD
        ),
    }


def estimated_parts():
    """The same for the document about GPUs."""
    return {"estimated": _tables([estimate.RESULT], estimate.table)}


def main(arguments=None):
    parser = report_parser("Tables of benchmarks/README.md from results/benchmarks/.")
    run_report(
        parser,
        parser.parse_args(arguments).check,
        lambda: {README: generated_parts(), estimate.DOCUMENT: estimated_parts()},
    )


if __name__ == "__main__":
    main()
