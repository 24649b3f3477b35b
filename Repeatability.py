"""Seeds, checksums and deterministic convolutions: same seed, same numbers.

The same seeds give the same numbers in every process of the same machine.

    rng = np.random.default_rng(derive_seed(seed, epoch))    # every pair has a random stream of its own
    with seeded(0):
        layer = torch.nn.Linear(4, 2)                        # the caller's generator stays as it was
"""

import contextlib
import zlib

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed):
    """Run a block under ``torch.manual_seed(seed)``, then restore the caller's CPU generator.

    This is for library code without a ``generator`` argument, such as weight initialisation and
    torchvision's transforms. Code that takes a :class:`torch.Generator` should get one instead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def derive_seed(*parts):
    """Mix several non-negative integers into one 63-bit seed.

    ``derive_seed(seed, epoch)`` gives every pair its own random stream. ``seed + epoch`` would not: seed 0
    in epoch 1 and seed 1 in epoch 0 would share one.

    Pass the same number of parts each time, each below 2^32; otherwise seeds can collide.

    Parameters
    ----------
    *parts : int
        The result is an int from 0 to 2^63 - 1.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def checksum(*arrays):
    """CRC-32 (int) of the contents of several arrays, in the order given."""
    result = 0
    for array in arrays:
        result = zlib.crc32(np.ascontiguousarray(array), result)
    return result


@contextlib.contextmanager
def deterministic_convolutions():
    """Context in which cuDNN uses only algorithms that sum in the same order in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    # cudnn.flags() would also allow TensorFloat-32 where the user has forbidden it.
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
