"""Retrain the last layer of a classifier on balanced classes, and leave its features as they are.

    retrain_last_layer(model, X, y, recipe, seed=0)

Reference: Kang et al. (2020), Decoupling representation and classifier for long-tailed recognition.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from Precision import mixed_precision

VIEWS = 2  # augmented views of each image


def retrain_last_layer(model, X, y, recipe, seed):
    """Replace the last layer by a logistic regression with balanced class weights on features of augmented images.

    Kang et al. train a new last layer by gradient descent on batches with equally many images of each class. The
    weights here have the same effect on the loss, and the regression converges.

    Parameters
    ----------
    model : ClassifierNetwork.ResNet18
        Trained, with a linear head. Changed in place.
    X : ndarray of uint8, shape (n, height, width, 3)
    y : ndarray of int, shape (n,)
    recipe : ClassifierTraining.Recipe
        Its augmentation is used.
    seed : int
        Of the augmentation.

    Raises
    ------
    ValueError
        If a class of the network has no image.
    """
    if len(np.unique(y)) != model.num_classes:
        raise ValueError(
            f"The last layer needs images of all {model.num_classes} classes, but y has {len(np.unique(y))} of them."
        )
    device = next(model.parameters()).device
    batches = recipe.batches(X, seed, device)
    model.eval()
    features, labels = [], []
    with torch.inference_mode(), mixed_precision(device):
        for number in range(1, VIEWS + 1):
            for images, rows in batches.epoch(number):
                features.append(model.features(images).float().cpu())
                labels.append(y[rows.cpu().numpy()])
    features, labels = torch.cat(features).numpy(), np.concatenate(labels)
    mean, scale = features.mean(axis=0), features.std()  # one scale: a feature that hardly varies stays small
    with warnings.catch_warnings():
        # Convergence to the last digit is not needed.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression = LogisticRegression(class_weight="balanced", max_iter=200).fit(
            (features - mean) / scale, labels
        )
    weight = regression.coef_ / scale
    bias = regression.intercept_ - weight @ mean
    if len(weight) == 1:  # of two classes there is one difference
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))
