"""Intervals and tests: which differences between classifiers may be chance?

    mean, half_width = mean_interval([0.61, 0.58, 0.63])             # over seeds
    weights = bootstrap_weights(y_test)                              # over test images
    recall = minority_scores(y_test, predictions, [3], weights)["recall"]
    low, high = np.quantile(recall, [0.025, 0.975])
    p = holm([mcnemar_over_seeds(y_test, first, second), 0.2])       # predictions of two models, a row a seed

Two things vary: the test images that happen to be there, and the seed of sampler, initial weights and image order. The
bootstrap and McNemar's test cover the first, the interval and the test over seeds cover the second.

References
----------
Dietterich (1998), Approximate statistical tests for comparing supervised classification learning algorithms. Efron
(1979), Bootstrap methods. Fisher (1935), The design of experiments. Holm (1979), A simple sequentially rejective multiple
test procedure. Howe (1974), Approximate confidence limits on the mean of X + Y where X and Y are two tabled independent
random variables. McNemar (1947), Note on the sampling error of the difference between correlated proportions. Spearman
(1904), The proof and measurement of association between two things. Student (1908), The probable error of a mean.
"""

import numpy as np
from scipy.stats import binom, norm, permutation_test, rankdata, t, ttest_1samp, zscore
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
        If there is no value, or ``level`` is not between 0 and 1.
    """
    values = np.asarray(values, dtype=float)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95: got {level}.")
    if not values.size:
        raise ValueError("There is no score to average.")
    if values.size < 3:
        return float(values.mean()), None
    factor = t.ppf((1 + level) / 2, values.size - 1)
    return float(values.mean()), float(factor * values.std(ddof=1) / np.sqrt(values.size))


def half_width_over_seeds_and_images(differences, resampled):
    """Half the width of a 95 % interval around a mean difference that covers the choice of seeds and that of test images.

    The two choices are independent, and the squares of their half-widths add up (Howe 1974). So the sum is never smaller than
    either. With few seeds it covers slightly more than 95 %.

    Parameters
    ----------
    differences : sequence of float
        One a seed, on the test set as it is.
    resampled : sequence of float
        The mean difference over these seeds in each bootstrap resample of the test images, two or more.

    Returns
    -------
    float or None
        None if there are fewer than three seeds, as in :func:`mean_interval`.
    """
    of_seeds = mean_interval(differences)[1]
    if of_seeds is None:
        return None
    return float(np.hypot(of_seeds, norm.ppf(0.975) * np.std(resampled, ddof=1)))


def t_test_over_seeds(differences):
    """Student's t-test: does a paired difference of two methods vary around zero from seed to seed?

    Parameters
    ----------
    differences : sequence of float
        One a seed. They are taken to be normally distributed.

    Returns
    -------
    float or None
        The two-sided p-value. None if there are fewer than three seeds, as in :func:`mean_interval`.

    Raises
    ------
    ValueError
        If a difference is not finite.
    """
    differences = np.asarray(differences, dtype=float)
    if not np.isfinite(differences).all():
        raise ValueError("The differences have NaN or infinity, which no test can take.")
    if differences.size < 3:
        return None
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)  # t would be infinite, or 0 / 0
    return float(ttest_1samp(differences, 0.0).pvalue)


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
    weights : ndarray of numbers or bool, shape (resamples, n)
        See :func:`bootstrap_weights`. None is negative. A row of ones gives the scores themselves, as does any other
        constant. A row that is True for some images gives the scores on these.

    Returns
    -------
    dict of ndarray of float, shape (resamples,)
        ``recall``, ``precision`` and ``f1``, each the mean over the minority classes, and ``accuracy``. The precision of a
        class that is never predicted is NaN, its F1 is 0.

    Raises
    ------
    ValueError
        If the arrays are not of the same images, there is no minority class or no image of one, or a weight is negative or
        not finite.
    """
    y_true, predictions, weights = map(np.asarray, (y_true, predictions, weights))
    if not np.issubdtype(weights.dtype, np.floating):
        weights = weights.astype(np.float64)  # products of small integers would wrap around
    if not y_true.shape == predictions.shape == weights.shape[1:]:
        raise ValueError(
            f"The true classes, predictions and weights must be of the same images, but have the shapes {y_true.shape}, "
            f"{predictions.shape} and {weights.shape}."
        )
    if not (weights.size and weights.min() >= 0 and np.isfinite(weights).all()):
        raise ValueError("The weights must be numbers, 0 or more, and finite.")
    if not len(minority_classes):
        raise ValueError("Name at least one minority class.")
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


def mcnemar_over_seeds(y_true, first, second):
    """McNemar's exact test of several seeds on the same test images: does one of two models get more of them right?

    An image counts by how many more seeds get it right with the second model than with the first. Under the null hypothesis
    the two models are exchangeable on each image, so that every count is as likely with the opposite sign (a sign-flip test,
    Fisher 1935). Images are independent of each other and the seeds of one image are not, which is why the image is the unit.
    With one seed this is McNemar's test. It covers the choice of test images and takes the trained models as given: between two
    seeds of one method it may find a difference, too. The interval of :func:`mean_interval` covers the choice of seed.

    Parameters
    ----------
    y_true : array of int, shape (n,)
        The true classes.
    first, second : array of int, shape (n,) or (seeds, n)
        The predictions of the two models, in the same order of images and seeds.

    Returns
    -------
    float
        The two-sided p-value, exact.

    Raises
    ------
    ValueError
        If the arrays are not of the same images and seeds, there is no seed, or some classes are numbers and others text.
    """
    y_true, first, second = map(np.asarray, (y_true, first, second))
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    if first.shape != second.shape or first.shape[1:] != y_true.shape or not len(first):
        raise ValueError(
            f"The predictions must be for the same images and for one seed or more, but y_true, first and second have the "
            f"shapes {y_true.shape}, {first.shape} and {second.shape}."
        )
    if len({np.issubdtype(classes.dtype, np.number) for classes in (y_true, first, second)}) > 1:
        raise ValueError(
            "True and predicted classes must be written alike, but some are numbers and some are not."
        )
    gains = np.sum(second == y_true, axis=0) - np.sum(first == y_true, axis=0)
    counts = np.bincount(np.abs(gains))[1:]  # images that gain or lose 1, 2, ... seeds
    total = int(counts @ np.arange(1, len(counts) + 1))
    # The distribution of the sum of all gains, from -total to total, is the convolution of one binomial for each size of a gain.
    distribution = np.ones(1)
    for size, count in enumerate(counts, start=1):
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, steps)
    at_least = np.abs(np.arange(-total, total + 1)) >= abs(int(gains.sum()))
    return float(min(1.0, distribution[at_least].sum()))


def holm(p_values):
    """P-values corrected for their number (Holm 1979).

    If no difference is real, the chance that any corrected value is below 0.05 is at most 5 %, provided that the p-values
    themselves are valid.

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
        If there are fewer than three values, not as many of each, or one is not finite.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or x.size < 3:
        raise ValueError(
            f"Two lists of at least three values are needed, got shapes {x.shape} and {y.shape}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("The values have NaN or infinity, which has no rank.")
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
