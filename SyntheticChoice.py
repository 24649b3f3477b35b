"""Choose among synthetic images with a network that was trained on them.

    rows = nearest_to_prototypes(model, X, y, real_rows)      # row numbers to train on, all real ones among them

References
----------
Snell et al. (2017), Prototypical networks (the class mean in feature space). Gal and Ghahramani (2016), Dropout as a
Bayesian approximation: github.com/Tma2333/StableDiffusionProject chose uncertain images so. Here uncertainty is the
entropy of the network's prediction.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ClassifierNetwork import extract_features, predict_logits


def nearest_to_prototypes(model, X, y, real_rows, fraction=0.5):
    """Keep the synthetic images of each class that lie nearest to the mean of the class's real ones.

    Distances are angles between features, so that the contrast of an image does not count.

    Parameters
    ----------
    model : ClassifierNetwork.ResNet18
        Trained on images of these classes.
    X : ndarray of uint8, shape (n, height, width, 3)
    y : ndarray of int64, shape (n,)
    real_rows : int
        The first rows up to this one are real.
    fraction : float, above 0, at most 1
        Of each class's synthetic images, rounded up.

    Returns
    -------
    ndarray of int64, shape (m,)
        Row numbers in ascending order: all real rows, and the chosen synthetic ones.

    Raises
    ------
    ValueError
        If ``fraction`` is out of range, or a class has synthetic images but no real one.
    """
    features = F.normalize(extract_features(model, X), dim=1)
    scores = np.empty(len(y) - real_rows, dtype=np.float32)
    for c in np.unique(y[real_rows:]):
        real = features[:real_rows][y[:real_rows] == c]
        if not len(real):
            raise ValueError(f"Class {c} has synthetic images but no real one, so it has no prototype.")
        prototype = F.normalize(real.mean(dim=0), dim=0)
        synthetic = y[real_rows:] == c
        scores[synthetic] = (features[real_rows:][torch.from_numpy(synthetic)] @ prototype).numpy()
    return _best_of_each_class(scores, y, real_rows, fraction)


def most_uncertain(model, X, y, real_rows, fraction=0.5):
    """Keep the synthetic images of each class that the network is least sure about, but takes for no other class.

    An image whose label is not among the network's first two answers is kept only if there are too few others.

    Parameters, returns and errors are those of :func:`nearest_to_prototypes`; a class without real images is allowed.
    """
    logits = torch.from_numpy(predict_logits(model, X[real_rows:]))
    log_p = logits.log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).numpy()
    plausible = (logits.topk(2).indices == torch.from_numpy(y[real_rows:, None])).any(dim=1).numpy()
    return _best_of_each_class(np.where(plausible, entropy, entropy - 100), y, real_rows, fraction)


def _best_of_each_class(scores, y, real_rows, fraction):
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1: got {fraction}.")
    chosen = [np.arange(real_rows)]
    for c in np.unique(y[real_rows:]):
        rows = np.flatnonzero(y[real_rows:] == c)
        count = math.ceil(fraction * len(rows))
        chosen.append(real_rows + rows[np.argsort(-scores[rows], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))
