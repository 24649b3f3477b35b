"""OpenMP's threads spin while they wait for each other. On a busy machine a training then takes many times as long.

    os.environ |= passive_waiting()     # for the programs that are started from here
    start_again_if_busy()               # the first line of a program that trains

OpenMP reads the variables once, when PyTorch is loaded. Passive waiting was slower on an
idle machine (see docs/lab-notes.md), so it is chosen on a busy one only. The numbers that a training computes do not depend on it.
"""

import os
import sys


def passive_waiting():
    """The environment variables that make waiting threads sleep, or none if this is not called for.

    Returns
    -------
    dict
        Empty if the machine is not busy (its load average is below its number of cores) or the user has chosen:
        ``OMP_NUM_THREADS``, ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` is set.
    """
    chosen = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if chosen or not hasattr(os, "getloadavg"):  # Windows has none
        return {}
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load < cores:
        return {}
    print(
        f"The machine is busy (load {load:.1f}, {cores} cores), so waiting threads sleep: OMP_WAIT_POLICY=PASSIVE.",
        flush=True,
    )
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def start_again_if_busy():
    """Start this program again with :func:`passive_waiting`, in the same process, if the machine is busy."""
    if variables := passive_waiting():
        os.execve(sys.executable, sys.orig_argv, os.environ | variables)
