"""Which generated images are worth training on: does CLIP see the class, and is the image new?

    margins = ClipFilter().margins(images, "cat")         # above 0: cat wins
    repeated = find_near_duplicates(small_images)

References
----------
Radford et al. (2021), Learning transferable visual models from natural language supervision (CLIP). He et
al. (2023), Is synthetic data from generative models ready for image recognition? (filtering generated
images by CLIP's zero-shot answer.)
"""

import math

import numpy as np
import torch

from DiffusionPipelines import load_pretrained
from ImbalancedCIFAR10 import CIFAR10_CLASSES
from Prompts import with_article
from Runtime import choose_device

CLIP_MODEL = "openai/clip-vit-base-patch32"


class ClipFilter:
    """CLIP's zero-shot opinion on generated images.

    Parameters
    ----------
    model : str
        Hub id or local folder of a CLIP model with its processor.
    class_names : sequence of str
        The classes that an image is compared with, the ten of CIFAR-10 by default.
    device : str or torch.device, optional
        Default: the fastest there is.

    Raises
    ------
    DiffusionPipelines.ModelUnavailableError
        If the model cannot be had.
    """

    def __init__(self, model=CLIP_MODEL, class_names=CIFAR10_CLASSES, device=None):
        from transformers import CLIPModel, CLIPProcessor

        self._device = choose_device(device)
        self._class_names = tuple(class_names)
        self._processor = load_pretrained(CLIPProcessor.from_pretrained, model, 0.01)
        network = load_pretrained(CLIPModel.from_pretrained, model, 0.7, use_safetensors=True)
        self._network = network.to(self._device).eval()

    @torch.no_grad()
    def margins(self, images, class_name):
        """By how much the class wins over the best of the others.

        Parameters
        ----------
        images : sequence of PIL.Image.Image
            Large ones: CLIP looks at 224x224 pixels.
        class_name : str
            A class that is not among ``class_names`` is added to them.

        Returns
        -------
        ndarray of float32, shape (n,)
            Probability of the class less the highest one of another class, between -1 and 1.
        """
        names = list(dict.fromkeys((*self._class_names, class_name)))
        texts = [f"a photo of {with_article(name)}" for name in names]
        inputs = self._processor(text=texts, images=list(images), return_tensors="pt", padding=True)
        answer = self._network(**inputs.to(self._device))
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
        Correlation from which on two images count as the same, at most 1.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for an image that repeats an earlier one which itself is not True.
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
    # The last component makes two images of one even colour alike, whose correlation is undefined.
    flat = np.concatenate([flat, np.ones((len(x), 1), dtype=np.float32)], axis=1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)
