"""The samplers that need no training: augmentation and cached Stable Diffusion images."""

import contextlib
import doctest
import random
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import python
from imblearn.over_sampling import SMOTE, BorderlineSMOTE, RandomOverSampler
from imblearn.over_sampling.base import BaseOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors
from torchvision.transforms import v2

import ImageOverSampler
import ImageStatistics
import NonSyntheticGeneration
from ImageCache import load_generated_images, save_generated_images
from ImageOverSampler import (
    TooFewImagesError,
    TooManyImagesError,
    UnsuitableImagesError,
    fewer_images_strategy,
    source_balanced_strategy,
)
from ImbalancedCIFAR10 import minority_split
from NonSyntheticGeneration import AugmentationOverSampler, PixelOverSampler
from StableDiffusionSampler import StableDiffusionOverSampler

SAMPLERS = {
    "mild": partial(AugmentationOverSampler, preset="mild"),
    "reference": partial(AugmentationOverSampler, preset="reference"),
    "stable diffusion": StableDiffusionOverSampler,
    "smote": partial(PixelOverSampler, SMOTE()),
}
SIZES = [12, 5, 3]  # images of each class in X, y


@pytest.fixture(params=SAMPLERS)
def make_sampler(request, tiny_cache):
    """Each sampler in turn, with the cache that the Stable Diffusion one reads."""
    return SAMPLERS[request.param]


@pytest.fixture
def X():
    return np.random.default_rng(0).integers(0, 256, size=(20, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def y():
    return np.random.default_rng(1).permutation(np.repeat([0, 1, 2], SIZES))


# --- What all samplers promise ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("auto", [12, 12, 12]),
        ("not majority", [12, 12, 12]),
        ("minority", [12, 5, 12]),
        ({1: 9}, [12, 9, 3]),
        ({0: 15, 1: 5, 2: 20}, [15, 5, 20]),
        (lambda y: {2: 4}, [12, 5, 4]),
    ],
)
def test_new_images_follow_the_given_ones_and_reach_the_sizes_asked_for(make_sampler, X, y, strategy, sizes):
    X_before, y_before = X.copy(), y.copy()
    X_res, y_res = make_sampler(sampling_strategy=strategy, random_state=0).fit_resample(X, y)
    assert np.bincount(y_res).tolist() == sizes
    assert X_res.shape == (sum(sizes), 32, 32, 3)
    assert X_res.dtype == np.uint8
    assert y_res.dtype == np.int64
    assert np.array_equal(X_res[:20], X_before)
    assert np.array_equal(y_res[:20], y_before)
    assert np.all(np.diff(y_res[20:]) >= 0)
    assert np.array_equal(X, X_before)  # the input itself is untouched
    assert not np.shares_memory(X_res, X)


def test_class_sizes_equal_those_of_imbalanced_learns_own_sampler(make_sampler, X, y):
    _, y_res = make_sampler(random_state=0).fit_resample(X, y)
    _, y_theirs = RandomOverSampler(random_state=0).fit_resample(X.reshape(len(X), -1), y)
    assert Counter(y_res.tolist()) == Counter(y_theirs.tolist())


@pytest.mark.parametrize("match", ["spectrum", "statistics"])
@pytest.mark.parametrize("make_sampler", sorted(SAMPLERS.keys() - {"smote"}), indirect=True)
def test_new_images_can_be_matched_to_the_given_ones(make_sampler, X, y, match):
    plain, y_plain = make_sampler(random_state=0).fit_resample(X, y)
    matched, y_matched = make_sampler(random_state=0, match=match).fit_resample(X, y)
    assert np.array_equal(y_plain, y_matched) and np.array_equal(matched[:20], X)
    maps = {"spectrum": ImageStatistics.match_spectrum, "statistics": ImageStatistics.match_statistics}
    assert np.array_equal(matched[20:], maps[match](plain[20:], X))
    with pytest.raises(
        ValueError, match="Unknown match 'colour'. Choose None or one of spectrum, statistics"
    ):
        make_sampler(match="colour").fit_resample(X, y)
    balanced = np.arange(20) % 2
    assert len(make_sampler(match=match).fit_resample(X, balanced)[0]) == 20  # nothing to match


def test_the_same_seed_gives_the_same_images_and_another_seed_others(make_sampler, X, y):
    first, again, other = (make_sampler(random_state=seed).fit_resample(X, y)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not any(np.array_equal(a, b) for a, b in zip(first[20:], other[20:], strict=True))


def test_a_sampler_can_be_used_twice(make_sampler, X, y):
    sampler = make_sampler(random_state=0)
    assert np.array_equal(sampler.fit_resample(X, y)[0], sampler.fit_resample(X, y)[0])


def test_the_callers_random_numbers_are_unaffected(make_sampler, X, y):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1:3], random.getstate()  # noqa: NPY002

    before = state()
    make_sampler(random_state=0).fit_resample(X, y)
    after = state()
    assert before[0] == after[0]
    assert np.array_equal(before[1][0], after[1][0])
    assert before[1][1] == after[1][1]
    assert before[2] == after[2]


def test_the_callers_random_numbers_have_no_influence(make_sampler, X, y):
    torch.manual_seed(1)
    first, _ = make_sampler(random_state=0).fit_resample(X, y)
    torch.manual_seed(2)
    second, _ = make_sampler(random_state=0).fit_resample(X, y)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("make_sampler", sorted(SAMPLERS.keys() - {"smote"}), indirect=True)
def test_the_images_of_a_class_do_not_depend_on_what_others_need(make_sampler, X, y):
    alone, _ = make_sampler(sampling_strategy={2: 9}, random_state=0).fit_resample(X, y)
    together, y_res = make_sampler(sampling_strategy={0: 14, 1: 30, 2: 9}, random_state=0).fit_resample(X, y)
    assert np.array_equal(alone[20:], together[20:][y_res[20:] == 2])


@pytest.mark.parametrize("sentinel", [0, 255])
def test_removed_images_have_no_influence(make_sampler, tiny_data, sentinel):
    split = minority_split(tiny_data.y_train, keep=4)
    removed = np.setdiff1d(np.arange(300), split.kept_rows(tiny_data.y_train))
    assert len(removed) == 26
    poisoned = tiny_data.X_train.copy()
    poisoned[removed] = sentinel
    clean, _ = make_sampler(random_state=0).fit_resample(*split.cut(tiny_data.X_train, tiny_data.y_train))
    result, _ = make_sampler(random_state=0).fit_resample(*split.cut(poisoned, tiny_data.y_train))
    assert len(result) == 300
    assert np.array_equal(result, clean)
    assert not np.any(np.all(result == sentinel, axis=(1, 2, 3)))


def test_samplers_are_imbalanced_learns(make_sampler, X, y):
    sampler = make_sampler(sampling_strategy={2: 7}, random_state=3)
    assert isinstance(sampler, BaseOverSampler)
    copy = clone(sampler)
    assert copy is not sampler
    assert repr(copy.get_params()) == repr(sampler.get_params())  # a sampler inside is cloned too
    assert {"sampling_strategy": {2: 7}, "random_state": 3}.items() <= sampler.get_params().items()
    assert np.array_equal(copy.fit_resample(X, y)[0], sampler.fit_resample(X, y)[0])
    assert len(sampler.set_params(sampling_strategy={2: 4}).fit_resample(X, y)[0]) == 21


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda X, y: (X / 255, y), TypeError, "uint8"),
        (lambda X, y: (X.astype(np.int64), y), TypeError, "uint8"),
        (lambda X, y: (X.reshape(20, -1), y), ValueError, "shape"),
        (lambda X, y: (X[0], y), ValueError, "shape"),
        (lambda X, y: (X[..., :1], y), ValueError, "shape"),
        (lambda X, y: (X.transpose(0, 3, 1, 2), y), ValueError, "shape"),
        (lambda X, y: (X, y[:-1]), ValueError, "y must"),
        (lambda X, y: (X, y[:, None]), ValueError, "y must"),
        (lambda X, y: (X, y.astype(float)), TypeError, "integers"),
        (lambda X, y: (X, y + 0.5), TypeError, "integers"),
        (lambda X, y: (X, y.astype(str)), TypeError, "integers"),
        (lambda X, y: (X[:0], y[:0]), ValueError, "shape"),
    ],
)
def test_other_arrays_are_refused(make_sampler, X, y, change, error, message):
    with pytest.raises(error, match=message):
        make_sampler().fit_resample(*change(X, y))


@pytest.mark.parametrize("strategy", [{0: 11}, {7: 5}, {2: -1}, "most", 2.0, 0.9])
def test_impossible_strategies_are_refused(make_sampler, X, y, strategy):
    with pytest.raises(ValueError):
        make_sampler(sampling_strategy=strategy).fit_resample(X, y)


@pytest.mark.parametrize("count", [10**8, 10**12])
def test_more_images_than_memory_holds_are_refused_before_anything_is_made(
    make_sampler, X, y, count, monkeypatch
):
    monkeypatch.setattr(
        ImageOverSampler.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 10**9)
    )
    sampler = make_sampler(sampling_strategy={2: count})
    monkeypatch.setattr(sampler, "_fit_resample", lambda X, y: pytest.fail("it began"))
    for method in (sampler.fit_resample, sampler.fit):
        with pytest.raises(
            TooManyImagesError, match=r"images in all, which need [\d,.]+ GB .*64\.0 GB are available"
        ):
            method(X, y)
    assert issubclass(TooManyImagesError, MemoryError) and issubclass(TooManyImagesError, ValueError)


def test_more_images_than_an_integer_holds_are_refused_too(make_sampler, X, y):
    with pytest.raises(TooManyImagesError, match="more images than any memory holds"):
        make_sampler(sampling_strategy={2: 10**30}).fit_resample(X, y)


def test_as_many_images_as_memory_holds_are_made(make_sampler, X, y, monkeypatch):
    monkeypatch.setattr(ImageOverSampler.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    make_sampler(sampling_strategy={2: 12}).fit_resample(X, y)
    with pytest.raises(TooManyImagesError):
        make_sampler(sampling_strategy={2: 700}).fit_resample(X, y)


def test_matching_needs_more_memory(X, y, monkeypatch):
    """600 images of 32x32 pixels are 1.8 MB, as two copies 3.7 MB, as floats up to 29 MB."""
    monkeypatch.setattr(
        ImageOverSampler.psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * 10**6)
    )
    for match, is_refused in ((None, False), ("spectrum", True), ("statistics", True)):
        sampler = AugmentationOverSampler(sampling_strategy={2: 600 - len(y) + np.sum(y == 2)}, match=match)
        with pytest.raises(TooManyImagesError) if is_refused else contextlib.nullcontext():
            sampler.fit_resample(X, y)


def test_labels_may_be_negative(X, y):
    X_res, y_res = AugmentationOverSampler(random_state=0).fit_resample(X, np.where(y == 2, -1, 1))
    assert np.sum(y_res == -1) == np.sum(y_res == 1) == np.sum(y != 2)


@pytest.mark.parametrize("count", [float("nan"), 9.5, 9.0, float("inf")])
def test_a_number_of_images_that_is_not_whole_is_refused(make_sampler, X, y, count):
    with pytest.raises(ValueError, match="whole number"):
        make_sampler(sampling_strategy={2: count}).fit_resample(X, y)


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -0.1])
def test_an_impossible_share_of_synthetic_images_is_refused(y, share):
    with pytest.raises(ValueError, match="share must be a finite number, 0 or more"):
        source_balanced_strategy(y, share)


# --- Augmentation -------------------------------------------------------------------------------


def test_an_unknown_preset_is_refused_with_the_valid_ones(X, y):
    with pytest.raises(ValueError, match=r"'wild'.*mild, mild-black-corners, reference"):
        AugmentationOverSampler(preset="wild").fit_resample(X, y)
    with pytest.raises(ValueError, match="Unknown preset 'wild'"):  # also if nothing is to be added
        AugmentationOverSampler(preset="wild", sampling_strategy={}).fit_resample(X, y)


@pytest.mark.parametrize("preset", ["mild", "reference"])
def test_augmented_images_differ_from_the_given_ones_and_from_each_other(X, y, preset):
    X_res, _ = AugmentationOverSampler(preset=preset, sampling_strategy={2: 53}, random_state=0).fit_resample(
        X, y
    )
    assert len({image.tobytes() for image in X_res}) == len(X_res) == 70


def test_augmented_images_are_made_from_images_of_their_own_class():
    X = np.full((13, 32, 32, 3), 20, dtype=np.uint8)
    y = np.array([0] * 8 + [1] * 3 + [2] * 2)
    X[np.arange(13), ..., y] = 180  # class 0 is red, 1 green, 2 blue; 'mild' leaves the hue alone
    X_res, y_res = AugmentationOverSampler(random_state=0).fit_resample(X, y)
    assert np.array_equal(X_res.mean(axis=(1, 2)).argmax(axis=1), y_res)
    assert len(y_res) == 24


def test_every_image_is_a_source_equally_often_give_or_take_one(monkeypatch):
    monkeypatch.setitem(NonSyntheticGeneration.PRESETS, "identity", lambda size: (v2.Identity(),))
    X = np.zeros((25, 32, 32, 3), dtype=np.uint8)
    X += np.arange(25, dtype=np.uint8)[:, None, None, None]  # an image's value is its row number
    y = np.array([0] * 20 + [1] * 5)
    X_res, _ = AugmentationOverSampler(
        preset="identity", sampling_strategy={1: 5 + 18}, random_state=0
    ).fit_resample(X, y)
    sources = Counter(X_res[25:, 0, 0, 0].tolist())
    assert sorted(sources) == [20, 21, 22, 23, 24]
    assert sorted(sources.values()) == [3, 3, 4, 4, 4]
    assert X_res[25:30, 0, 0, 0].tolist() != [20, 21, 22, 23, 24]  # in random order


@pytest.mark.parametrize("preset", ["mild", "reference"])
def test_a_class_with_a_single_image_can_be_augmented(X, preset):
    y = np.array([0] * 19 + [1])
    X_res, y_res = AugmentationOverSampler(preset=preset, random_state=0).fit_resample(X, y)
    assert np.bincount(y_res).tolist() == [19, 19]
    assert len({image.tobytes() for image in X_res[19:]}) == 19


def test_images_of_another_size_keep_it(X, y):
    small = np.ascontiguousarray(X[:, :16, :16])
    for preset in NonSyntheticGeneration.PRESETS:
        X_res, _ = AugmentationOverSampler(preset=preset, random_state=0).fit_resample(small, y)
        assert X_res.shape == (36, 16, 16, 3)


@pytest.mark.parametrize("preset", ["mild", "reference"])
def test_a_fifth_of_the_4950_images_of_the_reference_split_take_less_than_3_seconds(X, preset):
    y = np.array([0] * 10 + [1] * 10)
    sampler = AugmentationOverSampler(preset=preset, sampling_strategy={1: 10 + 990}, random_state=0)
    start = time.process_time()
    X_res, _ = sampler.fit_resample(X, y)
    assert time.process_time() - start < 3
    assert len(X_res) == 20 + 990


@pytest.mark.parametrize(("module", "examples"), [(NonSyntheticGeneration, 11), (ImageOverSampler, 1)])
def test_the_docstring_examples_are_true(module, examples):
    results = doctest.testmod(module)
    assert results.attempted >= examples
    assert results.failed == 0


# --- imbalanced-learn's own samplers ------------------------------------------------------------


def test_smote_images_are_those_of_imbalanced_learn_with_as_many_neighbours_as_there_are(X, y):
    """The smallest class has 3 images, so SMOTE's 5 neighbours become 2."""
    theirs, y_theirs = SMOTE(k_neighbors=2, random_state=3).fit_resample(
        X.reshape(20, -1).astype(np.float32), y
    )
    X_res, y_res = PixelOverSampler(SMOTE(), random_state=3).fit_resample(X, y)
    assert np.array_equal(X_res, np.rint(theirs).astype(np.uint8).reshape(-1, 32, 32, 3))
    assert np.array_equal(y_res, y_theirs)
    for c in (1, 2):
        of_class = X[y == c]
        new = X_res[20:][y_res[20:] == c]
        assert (new >= of_class.min(axis=0)).all() and (new <= of_class.max(axis=0)).all()


def test_random_oversampling_repeats_given_images(X, y):
    X_res, y_res = PixelOverSampler(RandomOverSampler(), random_state=0).fit_resample(X, y)
    given = {image.tobytes() for image in X[y == 2]}
    assert {image.tobytes() for image in X_res[y_res == 2]} == given and (y_res == 2).sum() == 12


class Constant(BaseOverSampler):
    """A sampler whose new rows all have one value."""

    def __init__(self, value, *, sampling_strategy="auto", random_state=None):
        super().__init__(sampling_strategy=sampling_strategy)
        self.value, self.random_state = value, random_state

    def _fit_resample(self, X, y):
        rows = [
            (c, np.full((n, X.shape[1]), self.value, X.dtype)) for c, n in self.sampling_strategy_.items()
        ]
        return np.concatenate([X, *(x for _, x in rows)]), np.concatenate(
            [y, *(np.full(len(x), c) for c, x in rows)]
        )


@pytest.mark.parametrize(("value", "pixel"), [(256.0, 255), (-1.0, 0), (1e9, 255), (254.6, 255), (7.4, 7)])
def test_pixels_beyond_the_range_do_not_wrap_around(X, y, value, pixel):
    X_res, _ = PixelOverSampler(Constant(value)).fit_resample(X, y)
    assert (X_res[20:] == pixel).all() and len(X_res) == 36
    assert np.array_equal(X_res[:20], X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_do_not_become_black(X, y, value):
    with pytest.raises(FloatingPointError, match="Constant gave pixels that are not finite"):
        PixelOverSampler(Constant(value)).fit_resample(X, y)


def test_the_given_sampler_is_left_as_it_is(X, y):
    smote = SMOTE()
    PixelOverSampler(smote, random_state=3).fit_resample(X, y)
    assert smote.get_params() == SMOTE().get_params()


def test_only_the_classes_that_are_resampled_limit_the_neighbours(X):
    y = np.repeat([0, 1, 2], [13, 6, 1])
    for neighbours in (4, NearestNeighbors(n_neighbors=4)):
        sampler = PixelOverSampler(SMOTE(k_neighbors=neighbours), sampling_strategy={1: 9}, random_state=3)
        X_res, y_res = sampler.fit_resample(X, y)
        expected, _ = SMOTE(k_neighbors=neighbours, sampling_strategy={1: 9}, random_state=3).fit_resample(
            X.reshape(20, -1).astype(np.float32), y
        )
        assert (X_res == np.rint(expected).astype(np.uint8).reshape(X_res.shape)).all()
        assert np.bincount(y_res).tolist() == [13, 9, 1]


def test_neighbours_of_a_class_with_one_image_are_refused(X):
    y = np.array([0] * 19 + [1])
    with pytest.raises(TooFewImagesError, match="SMOTE interpolates .* has only one"):
        PixelOverSampler(SMOTE()).fit_resample(X, y)
    X_res, _ = PixelOverSampler(RandomOverSampler()).fit_resample(X, y)
    assert len(X_res) == 38


# --- Stable Diffusion ---------------------------------------------------------------------------


def test_cached_images_are_drawn_from_their_class_without_replacement(tiny_cache, X, y):
    images, labels = load_generated_images(tiny_cache)
    X_res, y_res = StableDiffusionOverSampler(
        sampling_strategy={1: 5 + 60, 2: 3 + 20}, random_state=0
    ).fit_resample(X, y)
    for c, count in ((1, 60), (2, 20)):
        cached = {image.tobytes() for image in images[labels == c]}
        drawn = [image.tobytes() for image in X_res[20:][y_res[20:] == c]]
        assert len(set(drawn)) == len(drawn) == count
        assert set(drawn) <= cached


def test_a_cache_with_too_few_images_of_a_class_is_refused(tiny_cache, X, y):
    with pytest.raises(ValueError, match="60 images of class 2, but 61"):
        StableDiffusionOverSampler(sampling_strategy={2: 3 + 61}).fit_resample(X, y)


def test_a_class_that_the_cache_lacks_is_refused(tiny_cache, X, y):
    with pytest.raises(ValueError, match="0 images of class 11"):
        StableDiffusionOverSampler().fit_resample(X, y + 10)  # classes 10, 11 and 12


@pytest.mark.parametrize("size", [16, 64])
def test_images_of_another_size_than_the_caches_are_refused(tiny_cache, y, size):
    X = np.zeros((20, size, size, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=rf"32x32 pixels, but X has the shape \(20, {size}, {size}, 3\)"):
        StableDiffusionOverSampler(random_state=0).fit_resample(X, y)


def test_the_cache_may_hold_images_of_the_size_of_ones_own(y):
    X = np.zeros((20, 16, 24, 3), dtype=np.uint8)
    save_generated_images(np.full((30, 16, 24, 3), 7, np.uint8), np.repeat([0, 1, 2], 10), "x.npy")
    X_res, _ = StableDiffusionOverSampler(path="x.npy").fit_resample(X, y)
    assert X_res.shape == (36, 16, 24, 3) and np.all(X_res[20:] == 7)


def test_a_tilde_in_the_path_of_the_cache_is_the_home_folder(X, y, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_generated_images(
        np.full((30, 32, 32, 3), 7, dtype=np.uint8), np.repeat([0, 1, 2], 10), tmp_path / "x.npy"
    )
    assert len(StableDiffusionOverSampler(path="~/x.npy").fit_resample(X, y)[0]) == 36


def test_a_missing_cache_is_named(X, y):
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.npy.*import_cifake"):
        StableDiffusionOverSampler(path="elsewhere.npy").fit_resample(X, y)


def test_the_cache_may_lie_elsewhere(tmp_path, X, y):
    path = tmp_path / "other.npy"
    save_generated_images(np.full((30, 32, 32, 3), 7, dtype=np.uint8), np.repeat([0, 1, 2], 10), path)
    X_res, _ = StableDiffusionOverSampler(path=path).fit_resample(X, y)
    assert np.all(X_res[20:] == 7)


def test_the_sampler_does_not_hold_on_to_the_cache(tiny_cache, X, y):
    sampler = StableDiffusionOverSampler(random_state=0)
    sampler.fit_resample(X, y)
    with pytest.raises(ValueError):
        sampler.set_params(sampling_strategy={2: 1000}).fit_resample(X, y)
    assert not any(isinstance(value, np.ndarray) for value in vars(sampler).values())


def test_source_balanced_strategy_gives_every_class_some_synthetic_images():
    y = np.repeat(np.arange(4), [5000, 50, 4000, 2000])
    # What is missing to 5,000, or 40 % of 5,000 = 2,000 if this is more.
    assert source_balanced_strategy(y) == {0: 7000, 1: 5000, 2: 6000, 3: 5000}
    assert source_balanced_strategy(y, share=0) == {0: 5000, 1: 5000, 2: 5000, 3: 5000}


def test_fewer_images_keep_the_proportions_of_the_classes():
    y = np.repeat([0, 1, 2], [5000, 50, 5000])
    for strategy, expected in (
        ("auto", {1: 550, 2: 5000}),
        (source_balanced_strategy, {0: 5202, 1: 550, 2: 5202}),
        ({1: 1050}, {1: 550}),
    ):
        assert fewer_images_strategy(y, strategy=strategy, count=500) == expected
    for count in (0, 4951):
        with pytest.raises(ValueError, match=rf"{count:,} new images .* the strategy makes 1 to 4,950"):
            fewer_images_strategy(y, strategy="auto", count=count)


def test_source_balanced_strategy_may_be_given_as_a_function(make_sampler, X, y):
    for strategy in (source_balanced_strategy, source_balanced_strategy(y)):
        _, y_res = make_sampler(sampling_strategy=strategy).fit_resample(X, y)
        assert np.bincount(y_res).tolist() == [17, 12, 12]  # 0.4 x 12 = 4.8, so 5 for class 0


# --- Corners ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "black"), [("mild", False), ("mild-black-corners", True)])
@pytest.mark.parametrize("side", [32, 8, 50])
def test_mild_augmentation_leaves_no_black_corner_unless_asked(preset, black, side):
    X = np.full((12, side, side, 3), 200, dtype=np.uint8)
    sampler = AugmentationOverSampler(preset=preset, sampling_strategy={1: 100}, random_state=0)
    X_res, _ = sampler.fit_resample(X, np.repeat([0, 1], [9, 3]))
    corners = X_res[12:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert X_res.shape[1:] == (side, side, 3)
    assert bool((corners < 100).any()) == black


class Careless(ImageOverSampler.ImageOverSampler):
    """Makes what it is told to, whatever was asked for."""

    def __init__(self, made, *, sampling_strategy="auto"):
        super().__init__(sampling_strategy=sampling_strategy)
        self.made = made

    def _make_images(self, X, c, count, seed):
        return self.made(X, count)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda X, count: np.resize(X, (count - 1, *X.shape[1:])), r"uint8 of the shape \(6, 32"),
        (lambda X, count: np.resize(X / 255, (count, *X.shape[1:])), "returned float64"),
    ],
)
def test_a_sampler_that_makes_other_images_than_asked_for_is_named(X, y, made, found):
    with pytest.raises(TypeError, match=rf"Careless\._make_images must return uint8 .*{found}"):
        Careless(made).fit_resample(X, y)


@pytest.mark.parametrize("options", [{"sampling_strategy": {2: 5}}, {"random_state": 3}])
def test_a_sampler_on_pixels_takes_its_strategy_and_seed_from_outside_only(X, y, options):
    with pytest.raises(ValueError, match="Give sampling_strategy and random_state to PixelOverSampler"):
        PixelOverSampler(SMOTE(**options)).fit_resample(X, y)


def test_a_sampler_that_may_remove_images_is_refused(X, y):
    with pytest.raises(ValueError, match="must be an over-sampler .* got RandomUnderSampler"):
        PixelOverSampler(RandomUnderSampler()).fit_resample(X, y)


@pytest.mark.parametrize("module", ["NonSyntheticGeneration", "StableDiffusionSampler", "GANGeneration"])
def test_importing_a_sampler_loads_neither_plots_nor_the_classifier_nor_diffusers(module):
    unwanted = {"matplotlib", "ClassifierNetwork", "ClassifierTraining", "DiffusionPipelines", "diffusers"}
    answer = python(f"import sys, {module}; print(sorted({unwanted} & set(sys.modules)))")
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


def test_lists_of_images_give_arrays(X, y):
    for sampler in (AugmentationOverSampler(), PixelOverSampler(RandomOverSampler())):
        X_res, y_res = sampler.fit_resample(list(X), y.tolist())
        assert (type(X_res), X_res.dtype, y_res.dtype) == (np.ndarray, np.uint8, np.int64)
        assert np.array_equal(X_res[: len(X)], X)


def test_a_sampler_that_makes_nothing_is_noticed():
    """BorderlineSMOTE makes images only of a class that is mixed with others."""
    X = np.zeros((30, 4, 4, 3), dtype=np.uint8)
    X[24:] = 200
    X += np.random.default_rng(0).integers(0, 20, X.shape, dtype=np.uint8)
    with pytest.raises(UnsuitableImagesError, match=r"BorderlineSMOTE made no image of the classes \[1\]"):
        PixelOverSampler(BorderlineSMOTE(k_neighbors=3, m_neighbors=3)).fit_resample(
            X, np.repeat([0, 1], [24, 6])
        )


@pytest.mark.parametrize("sampler", [SMOTE, "smote", None])
def test_what_is_no_sampler_is_refused(sampler, X, y):
    with pytest.raises(ValueError, match="must be an over-sampler of imbalanced-learn, such as SMOTE"):
        PixelOverSampler(sampler).fit_resample(X, y)


def test_a_cache_that_may_be_numbered_differently_is_mentioned(X, y, tiny_cache):
    with pytest.warns(UserWarning, match="begin at 0, those in y at 1"):
        StableDiffusionOverSampler().fit_resample(X, y + 1)
