"""Intervals and tests against values worked out by hand or by another way."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, spearmanr
from sklearn.metrics import precision_recall_fscore_support

from Significance import (
    bootstrap_weights,
    half_width_over_seeds_and_images,
    holm,
    mcnemar_over_seeds,
    mean_interval,
    minority_scores,
    rank_correlation,
    t_test_over_seeds,
)

# --- Over seeds ---------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students():
    mean, half_width = mean_interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6)
    assert half_width == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-4)  # t with 2 degrees of freedom
    assert mean_interval([0.5, 0.6, 0.7], level=0.9)[1] == pytest.approx(2.9200 * 0.1 / np.sqrt(3), rel=1e-4)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.7]])
def test_one_or_two_seeds_have_no_interval(values):
    assert mean_interval(values) == (pytest.approx(np.mean(values)), None)
    with pytest.raises(ValueError, match="no score"):
        mean_interval([])


# --- Over test images ---------------------------------------------------------------------------

Y_TRUE = np.repeat([0, 1, 2], [40, 30, 20])


@pytest.fixture
def y_pred():
    rng = np.random.default_rng(1)
    return np.where(rng.random(len(Y_TRUE)) < 0.6, Y_TRUE, rng.integers(0, 3, len(Y_TRUE)))


def test_each_class_keeps_its_number_of_images_in_every_resample():
    weights = bootstrap_weights(Y_TRUE, resamples=50, seed=3)
    assert weights.shape == (50, len(Y_TRUE)) and weights.dtype == np.float32
    for c, count in enumerate([40, 30, 20]):
        assert (weights[:, c == Y_TRUE].sum(axis=1) == count).all()
    assert len(np.unique(weights, axis=0)) == 50
    assert (weights == bootstrap_weights(Y_TRUE, resamples=50, seed=3)).all()
    assert (weights != bootstrap_weights(Y_TRUE, resamples=50, seed=4)).any()


@pytest.mark.parametrize("minority", [[2], [1, 2]])
def test_weights_of_one_give_the_scores_themselves(minority, y_pred):
    scores = minority_scores(Y_TRUE, y_pred, minority, np.ones((1, len(Y_TRUE))))
    expected = precision_recall_fscore_support(Y_TRUE, y_pred, labels=minority)
    for key, values in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert scores[key] == pytest.approx([values.mean()])
    assert scores["accuracy"] == pytest.approx([(y_pred == Y_TRUE).mean()])


def test_a_weight_of_two_is_the_image_twice(y_pred):
    weights = bootstrap_weights(Y_TRUE, resamples=3, seed=0)
    scores = minority_scores(Y_TRUE, y_pred, [2], weights)
    for k, row in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(len(Y_TRUE)), row)
        alone = minority_scores(Y_TRUE[rows], y_pred[rows], [2], np.ones((1, len(rows))))
        assert {key: values[k] for key, values in scores.items()} == pytest.approx(
            {key: values[0] for key, values in alone.items()}
        )


def test_a_class_that_is_never_predicted_has_no_precision():
    scores = minority_scores(Y_TRUE, np.zeros_like(Y_TRUE), [2], np.ones((2, len(Y_TRUE))))
    assert all((scores[key] == 0).all() for key in ("recall", "f1"))
    assert np.isnan(scores["precision"]).all()


def test_only_the_proportions_of_the_weights_matter(y_pred):
    ones, small = (minority_scores(Y_TRUE, y_pred, [2], np.full((1, len(Y_TRUE)), w)) for w in (1, 0.01))
    assert {key: values[0] for key, values in ones.items()} == pytest.approx(
        {key: values[0] for key, values in small.items()}
    )


@pytest.mark.parametrize(
    ("predictions", "minority", "weights", "message"),
    [
        (
            Y_TRUE[1:],
            [2],
            np.ones((1, 90)),
            r"same images, but have the shapes \(90,\), \(89,\) and \(1, 90\)",
        ),
        (Y_TRUE, [2], np.ones((1, 89)), "same images"),
        (Y_TRUE, [2, 7], np.ones((1, 90)), r"no image of the minority classes \[7\]"),
    ],
)
def test_scores_need_the_same_images_and_some_of_the_minority(predictions, minority, weights, message):
    with pytest.raises(ValueError, match=message):
        minority_scores(Y_TRUE, predictions, minority, weights)


def test_the_bootstrap_interval_is_scipys(y_pred):
    weights = bootstrap_weights(Y_TRUE, resamples=20000, seed=0)
    recall = minority_scores(Y_TRUE, y_pred, [1], weights)["recall"]
    right = (y_pred == 1)[Y_TRUE == 1].astype(float)
    expected = bootstrap((right,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert np.quantile(recall, [0.025, 0.975]) == pytest.approx(list(expected), abs=0.01)


# --- Tests --------------------------------------------------------------------------------------


def predictions(only_first, only_second, both=3, neither=2):
    """True classes and two models' predictions with these numbers of right answers."""
    counts = (only_first, only_second, both, neither)
    first = np.repeat([1, 0, 1, 0], counts)
    second = np.repeat([0, 1, 1, 0], counts)
    return np.ones(sum(counts), dtype=int), first, second


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (0, 5, 2 / 32),  # 2 * C(5,0) / 2^5
        (1, 6, 0.125),  # 2 * (C(7,0) + C(7,1)) / 2^7 = 2 * 8 / 128
        (2, 8, 112 / 1024),  # 2 * (1 + 10 + 45) / 2^10
    ],
)
def test_one_seed_is_mcnemars_test_by_hand_in_both_orders(only_first, only_second, p_value):
    y_true, first, second = predictions(only_first, only_second)
    assert mcnemar_over_seeds(y_true, first, second) == pytest.approx(p_value)
    assert mcnemar_over_seeds(y_true, second, first) == pytest.approx(p_value)
    assert mcnemar_over_seeds(y_true, [first], [second]) == pytest.approx(p_value)


def test_one_seed_is_the_binomial_test_of_the_images_that_one_model_gets_right():
    y_true, first, second = predictions(130, 170, both=300, neither=200)
    assert mcnemar_over_seeds(y_true, first, second) == pytest.approx(binomtest(130, 300).pvalue)


def test_images_that_both_or_neither_get_right_do_not_matter():
    one, other = predictions(1, 6, both=0, neither=0), predictions(1, 6, 90, 70)
    assert mcnemar_over_seeds(*one) == pytest.approx(mcnemar_over_seeds(*other))


def test_seeds_flip_their_sign_together_for_each_image():
    """Images that gain 2, 1, 1 and -1 seeds: of 16 equally likely sums, those of 3 or more either way."""
    y_true = np.ones(5, dtype=int)
    first = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    second = [[1, 1, 0, 0, 1], [1, 0, 1, 1, 0]]
    sums = [abs(2 * a + b + c + d) for a, b, c, d in itertools.product([-1, 1], repeat=4)]
    assert mcnemar_over_seeds(y_true, first, second) == pytest.approx(np.mean(np.array(sums) >= 3))


def test_the_same_images_in_more_seeds_are_no_new_evidence_and_seeds_that_contradict_are_none():
    y_true, first, second = predictions(2, 8)
    three = mcnemar_over_seeds(y_true, [first] * 3, [second] * 3)
    assert three == pytest.approx(112 / 1024)  # as with one seed
    assert mcnemar_over_seeds(y_true, [first, second], [second, first]) == 1


@pytest.mark.parametrize(
    "shapes", [(5, 4, 5), (5, 5, 4), (4, 5, 5), (5, (2, 5), (3, 5)), (5, (0, 5), (0, 5))]
)
def test_mcnemar_refuses_predictions_for_other_images_or_seeds(shapes):
    with pytest.raises(ValueError, match="same images and for one seed or more"):
        mcnemar_over_seeds(*(np.zeros(n, dtype=int) for n in shapes))


def test_holm_multiplies_the_smallest_by_their_number():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.04]) == [0.04] and holm([]) == []


# --- Ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "rho", "p"),
    [
        ([1.0, 2.0, 3.0], 1.0, 2 / 6),
        ([3.0, 2.0, 1.0], -1.0, 2 / 6),
        ([10.0, 20.0, 15.0], 0.5, 1.0),
    ],
)
def test_rank_correlation_asks_all_orders(y, rho, p):
    found = rank_correlation([1, 5, 7], y)
    assert found == pytest.approx((rho, p))


def test_rank_correlation_is_spearmans_with_ties_and_many_values():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 30), rng.integers(0, 5, 30)
    expected = spearmanr(x, y)
    rho, p = rank_correlation(x, y)
    assert rho == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue, abs=0.03)
    assert rank_correlation(x, y) == (rho, p)


def test_what_does_not_vary_has_no_rank_correlation():
    assert np.isnan(rank_correlation([1, 2, 3], [4, 4, 4])).all()


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([[1, 2, 3]], [[1, 2, 3]])])
def test_rank_correlation_needs_three_pairs(x, y):
    with pytest.raises(ValueError, match="at least three values"):
        rank_correlation(x, y)


def test_what_has_no_rank_no_level_or_other_names_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity, which has no rank"):
        rank_correlation([1, 2, float("nan"), 4], [1, 3, 2, 4])
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            mean_interval([0.1, 0.2, 0.3], level)
    with pytest.raises(ValueError, match="at least one minority class"):
        minority_scores([0, 1], [0, 1], [], np.ones((1, 2)))
    with pytest.raises(ValueError, match="must be written alike"):
        mcnemar_over_seeds(["0", "1"], [0, 1], [1, 1])
    assert mcnemar_over_seeds(["a", "b"], ["a", "a"], ["a", "bb"]) == 1


def test_an_interval_over_seeds_and_images_covers_a_true_difference_that_both_blur():
    """In 95 % or slightly more of 2,000 studies of four seeds; the interval over seeds alone covers it in far fewer."""
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(2000):
        # The images that happen to be there shift all seeds alike; the bootstrap sees how far.
        differences = 5 + rng.normal(scale=2) + rng.normal(scale=1.5, size=4)
        resampled = rng.normal(differences.mean(), 2, size=400)
        half_widths = half_width_over_seeds_and_images(differences, resampled), mean_interval(differences)[1]
        covered += np.abs(differences.mean() - 5) <= half_widths
    assert 0.94 < covered[0] / 2000 < 0.98
    assert covered[1] / 2000 < 0.75


def test_an_interval_over_seeds_and_images_is_that_of_the_part_that_varies():
    differences, still = [0.1, 0.3, 0.2], [0.2, 0.2]
    assert half_width_over_seeds_and_images(differences, still) == pytest.approx(
        mean_interval(differences)[1]
    )
    shifted = np.random.default_rng(0).normal(0.2, 0.1, 100_000)
    assert half_width_over_seeds_and_images([0.2] * 3, shifted) == pytest.approx(0.196, rel=0.01)
    assert half_width_over_seeds_and_images([0.2] * 3, still) == pytest.approx(0, abs=1e-12)
    assert half_width_over_seeds_and_images([0.1, 0.2], shifted) is None


def test_the_p_value_over_seeds_is_that_of_students_t_test():
    # t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
    assert t_test_over_seeds([0.01, 0.02, 0.03]) == pytest.approx(1 - np.sqrt(12 / 14))
    assert t_test_over_seeds([-0.01, -0.02, -0.03]) == pytest.approx(1 - np.sqrt(12 / 14))
    assert t_test_over_seeds([-0.01, 0.01, -0.01, 0.01]) == pytest.approx(1)


def test_two_seeds_have_no_p_value_and_equal_differences_an_exact_one():
    assert t_test_over_seeds([0.1, 0.2]) is None
    assert t_test_over_seeds([0.1, 0.1, 0.1]) == 0
    assert t_test_over_seeds([0.0, 0.0, 0.0]) == 1
    with pytest.raises(ValueError, match="NaN or infinity"):
        t_test_over_seeds([0.1, np.nan, 0.2])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_weights_of_every_kind_count_alike(dtype):
    """600 images overflow uint8, and True + True is True."""
    y = np.zeros(600, dtype=int)
    y[:10] = 1
    scores = minority_scores(y, y, [1], np.ones((1, 600), dtype=dtype))
    assert {name: values.tolist() for name, values in scores.items()} == dict.fromkeys(scores, [1.0])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_weights_that_are_no_counts_are_refused(bad):
    weights = np.ones((2, 4))
    weights[1, 2] = bad
    with pytest.raises(ValueError, match="weights must be"):
        minority_scores(np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1]), [1], weights)
