"""Compare methods on development splits, without the test set and without the class that the study reports.

    python Development.py --method adjusted stable-spectrum-quarter --split dog-50 ship-50 --seed 0
    python Development.py --method adjusted --profile headline      # with the network and recipe of that profile
    python DevelopmentReport.py      # the tables in docs/development.md

1,000 images of each class are held out of the training set first. Another class than the study's is then cut in the
rest. Methods are compared on the held-out images. Results lie in ``results/development/``. A finished run is not run
again, and a killed one continues. What is chosen here becomes an arm of ``Arms.py``, which the test set judges once.
"""

import argparse

from Arms import PROFILES
from BusyMachine import start_again_if_busy
from DevelopmentReport import SCORES, methods_table
from DevelopmentSplits import SPLITS, check_splits, held_out_set, prepare_images
from Experiment import seed_number
from ImbalancedCIFAR10 import load_cifar10
from Methods import METHODS, find_method
from MethodTraining import Budget, run_method


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text!r}")
    return int(text)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Compare methods on development splits, without the test set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:52}{method.what}" for name, method in METHODS.items()),
    )
    add = parser.add_argument
    add("--method", nargs="+", required=True, metavar="METHOD", help="one or more methods, or 'all'")
    add("--split", nargs="+", default=SPLITS, help=f"development splits (default: {' '.join(SPLITS)})")
    add("--seed", nargs="+", type=seed_number, default=[0], help="seeds (default: 0)")
    add("--steps", type=_positive, help="training steps (default: those of cpu)")
    add("--width", type=_positive, help="of the ResNet-18 (default: that of cpu)")
    add("--profile", choices=PROFILES, help="network and recipe of a profile, instead of --steps and --width")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the fastest there is")
    options = parser.parse_args(arguments)
    if options.profile and (options.steps or options.width):
        parser.error("--profile decides width and steps: leave out --steps and --width")
    cpu = PROFILES["cpu"]
    budget = Budget(options.width or cpu.width, options.steps or cpu.steps)
    if options.profile:
        budget = Budget.of_profile(options.profile)
    names = list(METHODS) if options.method == ["all"] else options.method
    try:
        for name in names:
            find_method(name)
        _run_all(names, options, budget)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(methods_table(budget.folder))


def _run_all(names, options, budget):
    data = load_cifar10()
    rest = held_out_set(data)
    check_splits(rest, options.split)
    if any(find_method(name).needs_stable_diffusion for name in names):
        prepare_images(rest, options.split)
    for seed in options.seed:
        for name in names:
            for split_name in options.split:
                scores = run_method(data, name, split_name, seed, budget, options.device)["validation"]
                text = ", ".join(f"{key.replace('_', ' ')} {scores[key]:.1%}" for key in SCORES)
                print(f"{name}, {split_name}, seed {seed}: {text}", flush=True)


if __name__ == "__main__":
    start_again_if_busy()
    main()
