"""Intervals and tests: which differences between classifiers may be chance?

    mean, half_width = mean_interval([0.61, 0.58, 0.63])             # over seeds
    weights = bootstrap_weights(y_test)                              # over test images
    recall = minority_scores(y_test, predictions, [3], weights)["recall"]
    low, high = np.quantile(recall, [0.025, 0.975])
    p = holm([combined_mcnemar(tests_of_the_seeds), 0.2])

Two things vary: the test images that happen to be there, and the seed of sampler, initial weights and image order. The
bootstrap and McNemar's test cover the first, the interval over seeds covers the second.

References
----------
Dietterich (1998), Approximate statistical tests for comparing supervised classification learning algorithms. Efron
(1979), Bootstrap methods. Holm (1979), A simple sequentially rejective multiple test procedure. McNemar (1947), Note on the
sampling error of the difference between correlated proportions. Spearman (1904), The proof and measurement of association
between two things. Vovk and Wang (2020), Combining p-values via averaging.
"""

import numpy as np
from scipy.stats import binomtest, permutation_test, rankdata, t, zscore
from statsmodels.stats.multitest import multipletests

RESAMPLES = 2000


def mean_interval(values, level=0.95):
    """Mean of a score over seeds, and half the width of Student's interval around it.

    Parameters
    ----------
    values : sequence of float
        One score a seed.
    level : float, default 0.95
        Between 0 and 1.

    Returns
    -------
    mean : float
    half_width : float or None
        None if there are fewer than three seeds: the interval of two is wider than most scores can vary.

    Raises
    ------
    ValueError
        If there is no value.
    """
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise ValueError("There is no score to average.")
    if values.size < 3:
        return float(values.mean()), None
    factor = t.ppf((1 + level) / 2, values.size - 1)
    return float(values.mean()), float(factor * values.std(ddof=1) / np.sqrt(values.size))


def bootstrap_weights(y_true, resamples=RESAMPLES, seed=0):
    """How often each test image is drawn in each resample of a stratified bootstrap.

    Every class is resampled by itself, so that each keeps its number of images, as in the test set. Give all classifiers
    that are compared the same weights: then differences between them are paired.

    Parameters
    ----------
    y_true : ndarray of int, shape (n,)
    resamples : int
    seed : int

    Returns
    -------
    ndarray of float32, shape (resamples, n)
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(y_true)), dtype=np.float32)
    for c in np.unique(y_true):
        rows = np.flatnonzero(y_true == c)
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
    return weights


def minority_scores(y_true, predictions, minority_classes, weights):
    """Scores of one classifier in each bootstrap resample.

    Parameters
    ----------
    y_true, predictions : ndarray of int, shape (n,)
    minority_classes : sequence of int
    weights : ndarray of float, shape (resamples, n)
        See :func:`bootstrap_weights`. A row of ones gives the scores themselves, as does any other constant.

    Returns
    -------
    dict of ndarray of float, shape (resamples,)
        ``recall``, ``precision`` and ``f1``, each the mean over the minority classes, and ``accuracy``. The precision of a
        class that is never predicted is NaN, its F1 is 0.

    Raises
    ------
    ValueError
        If the arrays are not of the same images, or there is no image of a minority class.
    """
    y_true, predictions, weights = map(np.asarray, (y_true, predictions, weights))
    if not y_true.shape == predictions.shape == weights.shape[1:]:
        raise ValueError(
            f"The true classes, predictions and weights must be of the same images, but have the shapes {y_true.shape}, "
            f"{predictions.shape} and {weights.shape}."
        )
    if missing := sorted(set(minority_classes) - set(y_true.tolist())):
        raise ValueError(f"There is no image of the minority classes {missing}.")
    right = y_true == predictions
    scores = []
    for c in minority_classes:
        found, predicted, there = (
            weights @ rows.astype(weights.dtype)
            for rows in (right & (y_true == c), predictions == c, y_true == c)
        )
        precision = np.where(predicted > 0, found / np.where(predicted > 0, predicted, 1), np.nan)
        scores.append((found / there, precision, 2 * found / (predicted + there)))
    recall, precision, f1 = np.mean(scores, axis=0)
    accuracy = weights @ right.astype(weights.dtype) / weights.sum(axis=1)
    return {"recall": recall, "precision": precision, "f1": f1, "accuracy": accuracy}


def mcnemar_test(y_true, first, second):
    """Exact McNemar test: does one of two models get more of the same images right (McNemar 1947)?

    Only images that exactly one of the models gets right carry information. Under the null hypothesis, each
    model is right on half of them. Dietterich (1998) recommends this test for comparing two classifiers on
    one test set. It covers the choice of test images. It does not cover the choice of seed.

    Parameters
    ----------
    y_true, first, second : array of int, shape (n,)
        The true classes and the predictions of the two models, in the same order of images.

    Returns
    -------
    dict
        ``only_first_right`` and ``only_second_right`` (numbers of images) and ``p_value`` (two-sided).

    Raises
    ------
    ValueError
        If the three arrays have different shapes.
    """
    y_true, first, second = map(np.asarray, (y_true, first, second))
    if not y_true.shape == first.shape == second.shape:
        raise ValueError(
            f"The predictions must be for the same images, but y_true, first and second have the shapes "
            f"{y_true.shape}, {first.shape} and {second.shape}."
        )
    only_first = int(np.sum((first == y_true) & (second != y_true)))
    only_second = int(np.sum((second == y_true) & (first != y_true)))
    discordant = only_first + only_second
    p_value = binomtest(only_first, discordant).pvalue if discordant else 1.0
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": float(p_value),
    }


def combined_p_value(p_values):
    """One p-value from those of several seeds on the same test images: twice their mean, at most 1.

    The seeds' tests depend on each other, because they share the test images. Twice the mean is valid however they
    depend (Vovk and Wang 2020); Fisher's and Stouffer's combinations are not. One p-value stays as it is.

    Parameters
    ----------
    p_values : sequence of float
        Between 0 and 1, at least one.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there is none, or one is no probability.
    """
    p_values = np.asarray(p_values, dtype=float)
    if not p_values.size or not np.all((p_values >= 0) & (p_values <= 1)):
        raise ValueError(f"One or more p-values between 0 and 1 are needed: got {p_values.tolist()}.")
    return float(p_values[0] if p_values.size == 1 else min(1.0, 2 * p_values.mean()))


def combined_mcnemar(tests):
    """One two-sided p-value from the McNemar tests of several seeds on the same test images.

    Each side is combined by :func:`combined_p_value`, and the smaller one doubled. Seeds that contradict each other
    therefore prove nothing, however small the p-value of each. With one seed it is the p-value of its exact test.

    Parameters
    ----------
    tests : sequence of dict
        What :func:`mcnemar_test` returned, at least one.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there is no test.
    """
    sides = []
    for key in ("only_first_right", "only_second_right"):
        counts = [(test[key], test["only_first_right"] + test["only_second_right"]) for test in tests]
        sides.append(
            combined_p_value([binomtest(k, n, alternative="greater").pvalue if n else 1.0 for k, n in counts])
        )
    return min(1.0, 2 * min(sides))


def holm(p_values):
    """P-values corrected for their number (Holm 1979): below 0.05 for any false finding with probability 0.05 at most.

    Parameters
    ----------
    p_values : sequence of float

    Returns
    -------
    list of float
        In the order of ``p_values``; empty if there is none.
    """
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


def rank_correlation(x, y):
    """Spearman's rank correlation (1904), with a permutation test: do ``x`` and ``y`` rank things alike?

    Parameters
    ----------
    x, y : sequences of float, shape (n,)
        At least three values each.

    Returns
    -------
    rho : float
        1 if they rank alike, -1 if in reverse, 0 without a relation. NaN if one of them does not vary.
    p : float
        Two-sided, from all orders of ``x`` (up to eight values) or 10,000 random ones. NaN if ``rho`` is.

    Raises
    ------
    ValueError
        If there are fewer than three values, or not as many of each.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or x.size < 3:
        raise ValueError(
            f"Two lists of at least three values are needed, got shapes {x.shape} and {y.shape}."
        )
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan")
    x, y = zscore(rankdata(x)), zscore(rankdata(y))  # Spearman's is Pearson's of the ranks
    test = permutation_test(
        (x,),
        lambda order, axis: np.mean(order * y, axis=axis),
        vectorized=True,
        permutation_type="pairings",
        n_resamples=np.inf if x.size <= 8 else 10_000,
        random_state=0,
    )
    return float(test.statistic), float(test.pvalue)
