"""Which images of the rare class are missed, what are they taken for, and what do they resemble?

found_and_missed_figure(results["logit-adjusted"][0], results["stable-source-aware"][0], data)
nearest_images_figure(result, load_classifier(study.weights_path("stable-source-aware")), X, y, data)
"""

import numpy as np
from sklearn.metrics import pairwise_distances_argmin_min

from Arms import ARMS
from GenerationQuality import ImageFeatures
from Report import caption
from Results import minority_of, predictions_of
from Utils import plot_image_rows


def found_and_missed_figure(first, second, data, columns=10):
    """Minority test images that only one of two runs finds, or neither, with what they are taken for.

    Parameters
    ----------
    first, second : dict
        Results of two arms, of the same test images.
    data : ImbalancedCIFAR10.ImageDataSet
        Only its test images and class names are used.
    columns : int, default 10
        Images in a row at most, chosen at random but always the same.

    Returns
    -------
    matplotlib.figure.Figure
    """
    predictions = [predictions_of(run) for run in (first, second)]
    minority = minority_of(first)
    found = [predicted == data.y_test for predicted in predictions]
    titles = [ARMS[run["arm"]].title for run in (first, second)]
    if titles[0] == titles[1]:
        titles = [f"{title}, seed {run['seed']}" for title, run in zip(titles, (first, second), strict=True)]
    groups = {  # who finds them -> the images, and whose answer is shown
        f"only by {titles[1]};\n{titles[0]} says": (found[1] & ~found[0], predictions[0]),
        f"only by {titles[0]};\n{titles[1]} says": (found[0] & ~found[1], predictions[1]),
        f"by neither;\n{titles[1]} says": (~found[0] & ~found[1], predictions[1]),
    }
    rows, captions, rng = {}, {}, np.random.default_rng(0)
    for words, (chosen, predicted) in groups.items():
        images = rng.permutation(np.flatnonzero(chosen & np.isin(data.y_test, minority)))
        label = f"{len(images):,} found {words}"
        rows[label] = data.X_test[images[:columns]]
        captions[label] = [data.class_names[c] for c in predicted[images[:columns]]]
    classes = ", ".join(first["minority_classes"])
    return plot_image_rows(rows, f"Test images of class {classes}\n{caption([first])}", captions)


def nearest_images_figure(result, model, X, y, data, columns=8):
    """Missed test images of the minority, each with the training images that lie nearest in the network's features.

    Parameters
    ----------
    result : dict
        Of one run.
    model : ClassifierNetwork.ResNet18
        The network of that run.
    X, y : ndarrays of uint8, shape (n, height, width, 3), and int64, shape (n,)
        The real training images of the run.
    data : ImbalancedCIFAR10.ImageDataSet
        Only its test images and class names are used.
    columns : int, default 8
        Images in a row at most, chosen at random but always the same.

    Returns
    -------
    matplotlib.figure.Figure
        Its title says how many of all missed images lie nearest to the class that they are taken for.
    """
    minority = minority_of(result)
    predicted, classes = predictions_of(result), ", ".join(result["minority_classes"])
    missed = np.flatnonzero(np.isin(data.y_test, minority) & (predicted != data.y_test))
    missed = np.random.default_rng(0).permutation(missed)
    if not missed.size:
        return plot_image_rows({"missed": data.X_test[:0]}, f"No image of class {classes} is missed")
    features = ImageFeatures(model.features, "the run's own network", model.head.weight.device)
    of_missed, of_training = features(data.X_test[missed]).numpy(), features(X).numpy()
    rare = np.flatnonzero(np.isin(y, minority))
    nearest, distance = pairwise_distances_argmin_min(of_missed, of_training)
    nearest_rare, distance_to_rare = pairwise_distances_argmin_min(of_missed, of_training[rare])
    shown = slice(columns)
    names = np.array(data.class_names)
    label = f"the nearest of {len(rare):,}\n({classes})"
    rows = {
        "missed, taken for": data.X_test[missed[shown]],
        "nearest training image": X[nearest[shown]],
        label: X[rare[nearest_rare[shown]]],
    }
    captions = {
        "missed, taken for": names[predicted[missed[shown]]],
        "nearest training image": names[y[nearest[shown]]],
        label: [f"{ratio:.1f} x as far" for ratio in (distance_to_rare / np.maximum(distance, 1e-12))[shown]],
    }
    same = np.mean(y[nearest] == predicted[missed])
    title = (
        f"{len(missed):,} missed images of class {classes}: {same:.0%} lie nearest to a training image of the class that "
        f"they are taken for,\n{np.mean(np.isin(y[nearest], minority)):.0%} nearest to one of their own class\n{caption([result])}"
    )
    return plot_image_rows(rows, title, captions)
