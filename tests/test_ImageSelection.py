"""CLIP's margins, near-duplicates, and the selection by both."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from DiffusionPipelines import ModelUnavailableError
from ImageSelection import ClipFilter, Selection, find_near_duplicates, select_candidates
from ImbalancedCIFAR10 import CIFAR10_CLASSES


def noise(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(n, size, size, 3), dtype=np.uint8)


def pictures(n, size=48):
    return [Image.fromarray(x) for x in noise(n, size)]


# --- CLIP ---------------------------------------------------------------------------------------


@pytest.fixture
def clip_filter(models):
    return ClipFilter(models["clip"], device="cpu")


def test_margins_are_the_probability_of_the_class_minus_the_best_other(clip_filter):
    images = pictures(6)
    # The same from the model's parts: cosine of image and text, times CLIP's learned scale.
    processor, network = clip_filter._processor, clip_filter._network
    texts = [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CIFAR10_CLASSES]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        answer = network(**inputs)
        cosines = answer.image_embeds @ answer.text_embeds.T
        probabilities = (network.logit_scale.exp() * cosines).softmax(1).numpy()
    for c, name in enumerate(CIFAR10_CLASSES):
        margins = clip_filter.margins(images, name)
        assert margins.dtype == np.float32
        expected = probabilities[:, c] - np.delete(probabilities, c, axis=1).max(axis=1)
        assert margins == pytest.approx(expected, abs=1e-5)


def test_exactly_one_class_wins(clip_filter):
    margins = np.array([clip_filter.margins(pictures(8), name) for name in CIFAR10_CLASSES])
    assert ((margins > 0).sum(axis=0) == 1).all()


def test_margins_do_not_depend_on_the_batch(clip_filter):
    images = pictures(5)
    alone = [clip_filter.margins([image], "cat")[0] for image in images]
    assert clip_filter.margins(images, "cat") == pytest.approx(np.array(alone), abs=1e-5)


def test_a_class_that_cifar10_lacks_is_compared_with_the_ten(clip_filter):
    images = pictures(3)
    before = clip_filter.margins(images, "cat")
    assert clip_filter.margins(images, "zebra").shape == (3,)
    # The zebra is not added for good: the other classes are judged as before.
    assert np.array_equal(clip_filter.margins(images, "cat"), before)


def test_a_missing_or_damaged_model_is_named(models, tmp_path):
    with pytest.raises(ModelUnavailableError, match=r"no model folder .*nowhere"):
        ClipFilter(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailableError, match="empty is incomplete or damaged"):
        ClipFilter(str(tmp_path / "empty"))


# --- Near-duplicates ----------------------------------------------------------------------------


def test_different_images_are_no_duplicates_and_copies_are():
    images = noise(30)
    assert not find_near_duplicates(images).any()
    together = np.concatenate([images, images[:5]])
    assert np.flatnonzero(find_near_duplicates(together)).tolist() == list(range(30, 35))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, ::-1],
        lambda x: np.clip(x * 0.6 + 40, 0, 255),
        lambda x: np.clip(x + np.random.default_rng(1).normal(0, 12, x.shape), 0, 255),
    ],
    ids=["mirrored", "paler", "noisy"],
)
def test_small_changes_are_seen_through(change):
    images = noise(4)
    changed = np.concatenate([images, change(images[2].astype(float))[None].astype(np.uint8)])
    assert np.flatnonzero(find_near_duplicates(changed)).tolist() == [4]


def test_an_image_that_repeats_only_a_rejected_one_stays():
    # a, b, c in a chain: b is near a, c is near b but not near a.
    x, y = noise(2).astype(float)
    chain = np.stack([x, 0.7 * x + 0.3 * y, 0.3 * x + 0.7 * y]).astype(np.uint8)
    assert find_near_duplicates(chain, threshold=0.7).tolist() == [False, True, False]
    assert find_near_duplicates(chain[1:], threshold=0.7).tolist() == [False, True]


def test_blocks_make_no_difference():
    images = noise(1200, 8)
    images[[600, 1100]] = images[[3, 599]]
    assert np.flatnonzero(find_near_duplicates(images)).tolist() == [600, 1100]


def test_even_colours_are_all_alike_and_no_image_is_no_error():
    even = np.stack([np.full((8, 8, 3), v, dtype=np.uint8) for v in (0, 0, 200)])
    assert find_near_duplicates(even).tolist() == [False, True, True]
    assert find_near_duplicates(np.empty((0, 8, 8, 3), dtype=np.uint8)).shape == (0,)


def test_hardly_any_real_photograph_repeats_another(cifar10):
    cats = cifar10.X_train[cifar10.y_train == 3][:1500]
    assert find_near_duplicates(cats).mean() < 0.005


# --- Selection ----------------------------------------------------------------------------------


def candidates(n=6, **columns):
    images = np.random.default_rng(0).integers(0, 256, size=(n, 32, 32, 3), dtype=np.uint8)
    return {
        "image": images, "usable": np.ones(n, dtype=bool), "flagged": np.zeros(n, dtype=int),
        "margin": np.full(n, np.nan, dtype=np.float32),
    } | columns  # fmt: skip


def test_selection_counts_every_rejection_once_and_says_why():
    table = candidates(
        8,
        usable=np.array([1, 0, 1, 1, 1, 1, 1, 1], dtype=bool),
        flagged=np.array([0, 5, 2, 0, 0, 0, 0, 0]),
        margin=np.array([0.5, 0.5, 0.5, 0.05, 0.5, 0.5, 0.5, 0.5], dtype=np.float32),
    )
    table["image"][4] = table["image"][0]  # repeats a kept image
    table["image"][5] = table["image"][3]  # repeats one that CLIP has rejected
    rows, report = select_candidates(table, 4, Selection(margin=0.1))
    assert rows.tolist() == [0, 2, 5, 6]
    assert report["rejected"] == {"safety checker": 1, "CLIP sees another class": 1, "near-duplicate": 1}
    assert (report["candidates"], report["kept"], report["left over"]) == (8, 4, 1)
    assert report["drawn again after the safety checker"] == 7


def test_without_a_clip_model_every_image_passes():
    assert select_candidates(candidates(), 6, Selection(margin=0.9))[0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": float("nan")}, "margin .* from -1 to 1: got nan"),
        ({"margin": 1.5}, "margin .* from -1 to 1: got 1.5"),
        ({"margin": float("-inf")}, "margin"),
        ({"similarity": float("nan")}, "similarity must be a number"),
    ],
)
def test_bars_that_compare_with_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Selection(**change)
    assert Selection(similarity=float("inf")).similarity > 1


def test_a_candidate_without_a_margin_among_judged_ones_is_not_let_in():
    margin = np.array([0.5, np.nan, 0.5, np.inf, 0.5, 0.5], dtype=np.float32)
    with pytest.raises(FloatingPointError, match="margin of 2 of 6 candidates is not finite"):
        select_candidates(candidates(margin=margin), 6, Selection(margin=0.1))


# --- NaN in CLIP --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["logit_scale", "visual_projection.weight", "text_model.final_layer_norm.bias"]
)
def test_a_clip_file_with_a_weight_that_is_not_finite_is_refused_by_name(models, tmp_path, name, value):
    folder = shutil.copytree(models["clip"], tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        FloatingPointError, match=rf"clip has a weight .*not finite, CLIP\.{name} in .*Get the model"
    ):
        ClipFilter(folder, device="cpu")


def test_a_judgement_that_is_not_finite_is_none(models):
    clip_filter = ClipFilter(models["clip"], device="cpu")
    hook = clip_filter._network.visual_projection.register_forward_hook(
        lambda m, i, output: output * float("nan")
    )
    with pytest.raises(FloatingPointError, match="judgement by the model .*clip in float32 has numbers"):
        clip_filter.margins(pictures(2), "cat")
    hook.remove()


@pytest.mark.parametrize("class_name", ["", " ", None])
def test_a_class_without_a_name_is_refused(clip_filter, class_name):
    with pytest.raises(ValueError, match="A class needs a name"):
        clip_filter.margins(pictures(1), class_name)


def test_a_clip_folder_with_half_precision_only_is_loaded(models, tmp_path):
    folder = shutil.copytree(models["clip"], tmp_path / "clip")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    images = pictures(3)
    expected = ClipFilter(models["clip"], device="cpu").margins(images, "cat")
    assert np.array_equal(ClipFilter(folder, device="cpu").margins(images, "cat"), expected)
