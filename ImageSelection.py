"""Which generated images are worth training on: does CLIP see the class, and is the image new?

    margins = ClipFilter().margins(images, "cat")         # positive where CLIP prefers "cat" to other classes
    repeated = find_near_duplicates(small_images)
    rows, report = select_candidates(candidates, 4950, Selection(margin=0.1))

References
----------
Radford et al. (2021), Learning transferable visual models from natural language supervision (CLIP). He et
al. (2023), Is synthetic data from generative models ready for image recognition? (filtering generated
images by CLIP's zero-shot answer.)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from DeviceFaults import device_faults
from DiffusionPipelines import load_pretrained
from FiniteNumbers import check_finite, check_weights
from ImbalancedCIFAR10 import CIFAR10_CLASSES
from Prompts import with_article
from Runtime import choose_device

CLIP_MODEL = "openai/clip-vit-base-patch32"


class ClipFilter:
    """CLIP's zero-shot classification of generated images among the classes of CIFAR-10.

    Parameters
    ----------
    model : str
        Hub id or local folder of a CLIP model with its processor.
    device : str or torch.device, optional
        Default: the fastest device.

    Raises
    ------
    DiffusionPipelines.ModelUnavailableError
        If the model is neither on this machine nor downloadable, or its files are damaged.
    FloatingPointError
        If a weight is NaN or infinite.
    """

    def __init__(self, model=CLIP_MODEL, device=None):
        from transformers import CLIPModel, CLIPProcessor

        self._device = choose_device(device)
        self._processor = load_pretrained(CLIPProcessor.from_pretrained, model, 0.01)
        network = load_pretrained(CLIPModel.from_pretrained, model, 0.7, use_safetensors=True)
        check_weights({"CLIP": network}, model)
        self._model = str(model)
        self._network = network.to(self._device).eval()

    @device_faults("The judgement of images by CLIP")
    @torch.no_grad()
    def margins(self, images, class_name):
        """Compute by how much a class wins over the best other class.

        Parameters
        ----------
        images : sequence of PIL.Image.Image
            At their original size, since CLIP reads 224x224 pixels.
        class_name : str
            The class. If CIFAR-10 does not have it, it is compared with all ten.

        Returns
        -------
        ndarray of float32, shape (n,)
            Probability of the class minus the highest probability of another class, between -1 and 1.

        Raises
        ------
        FloatingPointError
            If the model's answer has NaN or infinity.
        """
        names = list(dict.fromkeys((*CIFAR10_CLASSES, class_name)))
        texts = [f"a photo of {with_article(name)}" for name in names]
        inputs = self._processor(text=texts, images=list(images), return_tensors="pt", padding=True)
        answer = self._network(**inputs.to(self._device))
        check_finite(answer.logits_per_image, "The judgement", {"CLIP": self._network}, self._model)
        probabilities = answer.logits_per_image.float().softmax(dim=1)
        own = names.index(class_name)
        others = probabilities.clone()
        others[:, own] = -1
        return (probabilities[:, own] - others.amax(dim=1)).cpu().numpy()


def find_near_duplicates(images, threshold=0.95):
    """Find images that nearly repeat an earlier one of the same set, or its mirror image.

    Two images are compared by the correlation of their pixels, which ignores brightness and contrast.
    Mirror images count because the training loop flips images anyway.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, height, width, 3)
    threshold : float
        Two images count as the same if their correlation is at least this. A threshold above 1 finds none.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for an image that repeats an earlier image which itself is not marked True.
    """
    x = np.asarray(images, dtype=np.float32)
    vectors, mirrored = _unit_vectors(x), _unit_vectors(x[:, :, ::-1])
    repeated = np.zeros(len(x), dtype=bool)
    block = 512  # rows compared at a time, so that memory stays small
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        earlier = slice(0, start + block)
        alike = (
            np.maximum(vectors[rows] @ vectors[earlier].T, vectors[rows] @ mirrored[earlier].T) >= threshold
        )
        for i, row in enumerate(alike, start):
            repeated[i] = np.any(row[:i] & ~repeated[:i])
    return repeated


def _unit_vectors(x):
    flat = x.reshape(len(x), math.prod(x.shape[1:]))
    flat = flat - flat.mean(axis=1, keepdims=True)
    # The last component makes two images of uniform colour alike. Their correlation would be undefined.
    flat = np.concatenate([flat, np.ones((len(x), 1), dtype=np.float32)], axis=1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


# --- Selection ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Which candidates become training images, and whether they are matched with real images.

    Attributes
    ----------
    margin : float
        Lowest margin by which CLIP must prefer the class to every other class, a difference of probabilities
        from -1 to 1. See :meth:`ClipFilter.margins`. Without a CLIP model every image passes.
    similarity : float
        Two images whose pixels correlate at least this much count as near-duplicates, and only the first is
        kept. Above 1: all are kept. See :func:`find_near_duplicates`.
    match : bool
        Whether the selected images get the colours and the sharpness of the real images, see
        :func:`ImageStatistics.match_statistics`.

    Raises
    ------
    ValueError
        If the margin is not from -1 to 1, or the similarity is NaN.
    """

    margin: float = 0.1
    similarity: float = 0.95
    match: bool = False

    def __post_init__(self):
        if not -1 <= self.margin <= 1:  # also refuses NaN
            raise ValueError(
                f"margin is a difference of probabilities, so it must be from -1 to 1: got {self.margin}."
            )
        if math.isnan(self.similarity):
            raise ValueError(
                "similarity must be a number: got nan. Above 1, no image counts as a near-duplicate."
            )


class SelectionError(RuntimeError):
    """Too few candidates pass the selection. The message says how many each criterion rejects."""


def select_candidates(candidates, count, selection):
    """Choose the images of a data set among candidates, in the order of their indices.

    Parameters
    ----------
    candidates : dict of ndarray
        See :meth:`CandidateImages.CandidateMaker.make`.
    count : int
        Largest number of images to choose.
    selection : Selection

    Returns
    -------
    rows : ndarray of int
        Rows of the chosen candidates, ascending.
    report : dict
        Numbers of candidates: all, kept, rejected by each criterion, and left over.

    Raises
    ------
    FloatingPointError
        If some margins are not finite and others are. If none is finite, there was no CLIP model.
    """
    judged = np.isfinite(candidates["margin"])
    if judged.any() and not judged.all():
        raise FloatingPointError(
            f"CLIP's margin of {np.sum(~judged):,} of {len(judged):,} candidates is not finite, so they were not "
            "judged. Remove the shards that hold them and run again."
        )
    unsafe = ~candidates["usable"]
    doubtful = ~unsafe & (candidates["margin"] < selection.margin)  # False for NaN
    passing = np.flatnonzero(~unsafe & ~doubtful)
    repeated = find_near_duplicates(candidates["image"][passing], selection.similarity)
    rows = passing[~repeated][:count]
    report = {
        "candidates": len(unsafe),
        "kept": len(rows),
        "rejected": {
            "safety checker": int(unsafe.sum()),
            "CLIP sees another class": int(doubtful.sum()),
            "near-duplicate": int(repeated.sum()),
        },
        "left over": len(passing) - int(repeated.sum()) - len(rows),
        "drawn again after the safety checker": int(candidates["flagged"].sum()),
    }
    return rows, report
