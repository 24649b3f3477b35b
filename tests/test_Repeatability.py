"""Seeds, checksums and deterministic convolutions."""

import zlib

import numpy as np
import pytest
import torch

from Repeatability import checksum, derive_seed, deterministic_convolutions, seeded


def test_seeded_restores_the_generator_of_the_caller_even_after_an_error():
    before = torch.get_rng_state()
    with seeded(1):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError), seeded(1):
        assert torch.equal(torch.rand(3), inside)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(2):
        assert not torch.equal(torch.rand(3), inside)


def test_derived_seeds_are_distinct_repeatable_and_have_63_bits():
    parts = [(seed, epoch) for seed in range(40) for epoch in range(40)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*p) for p in parts]
    assert all(isinstance(s, int) and 0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**62
    torch.Generator().manual_seed(max(seeds))  # fits


X = np.random.default_rng(0).integers(0, 256, size=(4, 5, 6, 3), dtype=np.uint8)


Y = np.array([2, 0, 1, 2], dtype=np.int32)


def test_the_checksum_covers_all_contents_in_order():
    X, y = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(3)
    assert checksum(y, X) == zlib.crc32(y.tobytes() + X.tobytes())
    assert checksum(y, X[:, ::-1]) == zlib.crc32(y.tobytes() + X[:, ::-1].tobytes()) != checksum(y, X)


def test_deterministic_convolutions_keep_the_other_settings_of_the_user(monkeypatch):
    cudnn = torch.backends.cudnn
    for name, value in (("benchmark", True), ("deterministic", False), ("allow_tf32", False)):
        monkeypatch.setattr(cudnn, name, value)
    with pytest.raises(KeyError), deterministic_convolutions():
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (False, True, False)
        raise KeyError
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, False, False)
