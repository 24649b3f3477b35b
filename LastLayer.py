"""Change the last layer of a trained classifier for balanced classes, and leave its features as they are.

    retrain_last_layer(model, X, y, recipe, seed=0)
    adjust_logits(model, X, y, recipe, seed=0)

References
----------
Kang et al. (2020), Decoupling representation and classifier for long-tailed recognition. Menon et al. (2021),
Long-tail learning via logit adjustment.
"""

import dataclasses

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ClassifierNetwork import CosineLinear
from Losses import class_log_priors
from Precision import mixed_precision
from Repeatability import derive_seed

VIEWS = 2  # augmented views of each image


def retrain_last_layer(model, X, y, recipe, seed):
    """Replace the last layer by a logistic regression with balanced class weights on features of augmented images.

    Kang et al. train a new last layer by gradient descent on batches with equally many images of each class. The
    weights here have the same effect on the loss.

    Parameters
    ----------
    model : ClassifierNetwork.ResNet18
        Trained, with a linear head. Changed in place.
    X : ndarray of uint8, shape (n, height, width, 3)
        Real images.
    y : ndarray of int, shape (n,)
    recipe : ClassifierTraining.Recipe
        Its augmentation is used.
    seed : int
        Of the augmentation.

    Raises
    ------
    ValueError
        If a class of the network has no image, or its head gives cosines.
    """
    _check(model, y)
    device = next(model.parameters()).device
    # One batch, so that no row is left out.
    batches = dataclasses.replace(recipe, batch_size=len(y)).batches(X, derive_seed(seed, 7), device)
    model.eval()
    features, labels = [], []
    with torch.inference_mode(), mixed_precision(device):
        for number in range(1, VIEWS + 1):
            [(images, rows)] = batches.epoch(number)
            features += [model.features(part).float().cpu() for part in images.split(recipe.micro_batch_size)]
            labels.append(y[rows.cpu().numpy()])
    features, labels = torch.cat(features).numpy(), np.concatenate(labels)
    mean, scale = features.mean(axis=0), features.std()  # one scale: a feature that hardly varies stays small
    regression = LogisticRegression(class_weight="balanced", max_iter=2000)
    regression.fit((features - mean) / scale, labels)
    weight = regression.coef_ / scale
    bias = regression.intercept_ - weight @ mean
    if len(weight) == 1:  # of two classes there is one difference
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))


def adjust_logits(model, X, y, recipe, seed):
    """Subtract the logarithm of the class frequencies from the bias of the last layer.

    This is the logit adjustment of Menon et al. after the training, with tau = 1. The network is then meant for equal
    class frequencies. A network that learned with added images, too, is adjusted by the frequencies of the real ones.

    Parameters
    ----------
    model : ClassifierNetwork.ResNet18
        Trained with cross-entropy, with a linear head. Changed in place.
    y : ndarray of int, shape (n,)
        Classes of the real images.
    X, recipe, seed
        Not used: the interface of :func:`retrain_last_layer`.

    Raises
    ------
    ValueError
        If a class of the network has no image, or its head gives cosines.
    """
    _check(model, y)
    [priors] = class_log_priors(y, model.num_classes, np.zeros(len(y), dtype=int))
    with torch.no_grad():
        model.head.bias -= torch.from_numpy(priors).to(model.head.bias.device)


def _check(model, y):
    if isinstance(model.head, CosineLinear):
        raise ValueError(
            "A cosine head has no bias, so the last layer cannot be changed. Train with a linear head."
        )
    if not np.array_equal(np.unique(y), np.arange(model.num_classes)):
        raise ValueError(
            f"The last layer needs images of all {model.num_classes} classes, but y has {np.unique(y).tolist()}."
        )
