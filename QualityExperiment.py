"""How good the generated images of a study are: its features, and each method's images judged by them.

features = classifier_features(study, data)
judged = judge_generated_images(study, data, {"gan": images, "stable": other_images})
"""

import numpy as np

from ClassifierNetwork import (
    ResNet18,
    channel_statistics,
    create_classifier,
    load_classifier,
    save_classifier,
)
from ClassifierTraining import train_classifier
from Files import one_process_at_a_time, require_writable, save_json
from GenerationQuality import (
    INCEPTION_NAME,
    NEIGHBOURS,
    FeaturesUnavailableError,
    ImageFeatures,
    InceptionFeatures,
    generation_quality,
    memorisation,
)
from ImbalancedCIFAR10 import split_from_name
from Results import network_name
from Runtime import choose_device


def classifier_features(study, data, device=None):
    """Features of the ResNet-18 that the arm ``imbalanced`` trains, for measuring generated images.

    The network knows the kept training images and nothing else. It is trained now if its weights are missing, or
    those of another network. A second process waits for the first and then reads what it made.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    GenerationQuality.ImageFeatures
    """
    device, weights = choose_device(device), study.weights_path("imbalanced")

    def is_trained():
        if not weights.exists():
            return False
        found = load_classifier(weights, device)
        return {"width": found.width, "mirrored": found.mirrored} == _network(study, data)

    if not is_trained():
        with one_process_at_a_time(study.checkpoint_path("features"), "trains the network for the features"):
            if not is_trained():
                _train_network(study, data, device, weights)
    network = load_classifier(weights, device)
    return ImageFeatures(network.features, _features_name(study, data), device)


def _network(study, data):
    return study.settings.network(data.mirrored_images_keep_their_class)


def _train_network(study, data, device, weights):
    require_writable(weights)
    split = split_from_name(study.split, data.y_train, data.class_names)
    X, y = split.cut(data.X_train, data.y_train)
    network, classes = _network(study, data), len(data.class_names)
    model = create_classifier(classes, mean_std=channel_statistics(X), seed=0, device=device, **network)
    checkpoint = study.checkpoint_path("features")
    recipe = study.settings.recipe(len(y), data.mirrored_images_keep_their_class)
    train_classifier(model, X, y, recipe, seed=0, checkpoint=checkpoint)
    save_classifier(model, weights)
    checkpoint.unlink(missing_ok=True)


def judge_generated_images(study, data, generated, device=None):
    """Judge each method's images of the first minority class.

    The generated images are compared with the class's test images, which no generator saw. Nothing is
    chosen by the outcome. Near copies are looked for among the kept training images. New real images (the same
    test images) get the same check, because they too lie near some training image.

    The outcome is kept until the GAN is trained again or images of another method are given. Evidence profiles use Inception's features if its
    weights are available, else those of :func:`classifier_features`, as the other profiles do.

    Parameters
    ----------
    study : Results.Study
    data : ImbalancedCIFAR10.ImageDataSet
    generated : dict
        Arm name -> the images it adds to the class: uint8, shape (n, 32, 32, 3).
    device : str or torch.device, optional
        Default: the fastest there is.

    Returns
    -------
    dict
        The content of ``results/<profile>/<split>/generated-images.json``: ``class``,
        ``share_of_copies_among_new_real_images``, ``methods`` (arm name -> the dict of
        :func:`GenerationQuality.generation_quality` with ``share_of_copies``).

    Raises
    ------
    ValueError
        If the kept outcome is damaged, was judged by features that this study does not have, or has methods that
        ``generated`` lacks beside a new one.
    """
    path = study.record_path("generated-images.json")
    if path.exists():
        judged = study.read_judgement()
        _refuse_other_features(path, judged, _features_name(study, data))
        if generated.keys() <= judged["methods"].keys():
            return judged
        if lost := judged["methods"].keys() - generated.keys():
            raise ValueError(
                f"{path} has {', '.join(sorted(lost))} too. All methods are judged together, on equally many images: pass "
                "the images of these as well, or remove the file."
            )
    require_writable(path)
    split = split_from_name(study.split, data.y_train, data.class_names)
    c = split.minority_classes[0]
    X, y = split.cut(data.X_train, data.y_train)
    kept, unseen = X[y == c], data.X_test[data.y_test == c]
    count = min(len(unseen), *(len(images) for images in generated.values()))
    if len(kept) < 2 or count <= NEIGHBOURS:  # noticed before a network is trained for the features
        raise ValueError(
            f"Judging needs 2 kept images of class {data.class_names[c]} and {NEIGHBOURS + 1} images of each method and of the "
            f"test set, but there are {len(kept)} and {count}."
        )
    features = _best_features(study, data, device)
    rng = np.random.default_rng(0)
    judged = {
        "class": data.class_names[c],
        "share_of_copies_among_new_real_images": memorisation(kept, unseen, features).share_of_copies,
        "methods": {},
    }
    for name, images in generated.items():
        some = images[rng.choice(len(images), count, replace=False)]  # recall depends on their number
        judged["methods"][name] = generation_quality(unseen, some, features) | {
            "share_of_copies": memorisation(kept, images, features).share_of_copies
        }
    save_json(path, judged)
    return judged


def _refuse_other_features(path, judged, own):
    """Numbers from other features than this study's cannot be compared with its own."""
    for scores in judged["methods"].values():
        if scores.get("features") not in (INCEPTION_NAME, own):
            raise ValueError(
                f"{path} was judged by other features ({scores.get('features')}) than this study has: {own}, or "
                f"{INCEPTION_NAME}. Remove it to judge again."
            )


def _features_name(study, data):
    network = network_name(_network(study, data) | {"downsampling": ResNet18.downsampling})
    most = data.most_images_a_class
    part = "" if most is None else f", at most {most} images a class"
    return f"{network}, trained on {study.split} of {study.data}{part}"


def _best_features(study, data, device):
    if study.settings.evidence:
        try:
            return InceptionFeatures(choose_device(device))
        except FeaturesUnavailableError as error:
            print(f"Judged with the features of our own classifier: {error}")
    return classifier_features(study, data, device)
