"""ResNet-18 for small images: the network, its files and its evaluation.

    model = create_classifier(num_classes=10, width=64, mean_std=channel_statistics(X), seed=0)
    evaluation = evaluate_classifier(model, X_test, y_test)
    classes = predict_logits(model, X_new).argmax(axis=1)
    save_classifier(model, "models/resnet.pt")

The network takes uint8 images as they are. Normalisation is its first layer, so a saved network cannot get
wrongly scaled input. ``ClassifierTraining.py`` trains it.

References
----------
He et al. (2016), Deep residual learning for image recognition. Zhang (2019), Making convolutional networks
shift-invariant again.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from Checkpoints import load_torch_file, save_torch_file
from Checks import check_images, check_labels, check_pixels
from FiniteNumbers import require_finite
from GhostBatchNorm import GhostBatchNorm2d
from MirroredFilters import HalvedMirroredConv2d, mirrored_filters
from Precision import mixed_precision
from Repeatability import derive_seed, seeded
from Runtime import choose_device

# --- Network ------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them (the basic block of He et al. 2016).

    A block that halves the image averages 2x2 places of its input. He et al. use convolutions of stride 2
    instead. Averaging costs no more operations and leaves no place out, so the output depends less on small
    shifts of the image (Zhang 2019).

    Parameters
    ----------
    in_channels, out_channels : int
    halve : bool
        Whether the output has half the height and width of the input, rounded up.
    """

    def __init__(self, in_channels, out_channels, halve):
        super().__init__()
        # With ceil_mode, an odd side keeps its last place: the sides are those of a stride of 2.
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if halve else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = GhostBatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = GhostBatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), GhostBatchNorm2d(out_channels)
            )

    def forward(self, x):
        x = self.pool(x)
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class CosineLinear(nn.Linear):
    """A linear layer without bias whose input and weights are scaled to length 1, so that it gives cosines."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class ResNet18(nn.Module):
    """ResNet-18 with a stem for small images (a 3x3 convolution, no max-pooling), and average pooling
    instead of strides.

    Parameters
    ----------
    num_classes : int
        At least 2.
    width : int, default 64
        Channels of the first stage. The four stages have ``width`` x (1, 2, 4, 8) channels. 64 is the
        standard (11,173,962 parameters for ten classes), 42 is the reference study's.
    mean_std : pair of sequences of 3 floats
        Mean and standard deviation of each colour channel, in pixel values from 0 to 255. They are kept in
        the state dict.
    cosine_head : bool, default False
        Whether logits are cosines of the angle between the features and each class's weights, as
        :class:`Losses.LDAMLoss` needs them.
    mirrored : bool, default False
        Whether every filter's mirror image is a filter too, so that an image and its mirror image get the same logits:
        see :func:`MirroredFilters.mirrored_filters`.

    Raises
    ------
    ValueError
        If ``num_classes`` or ``width`` is too small, or ``width`` is odd and filters come in mirrored pairs.
    """

    # Weights of a network with strides have the same shapes but would predict wrongly here, so files
    # and checkpoints name this.
    downsampling = "average pooling"
    mirrored = False

    def __init__(
        self,
        num_classes=10,
        width=64,
        mean_std=((127.5,) * 3, (63.75,) * 3),
        cosine_head=False,
        mirrored=False,
    ):
        super().__init__()
        num_classes, width = int(num_classes), int(width)  # a NumPy integer would not come back from a file
        if width < 1 or num_classes < 2:
            raise ValueError(
                f"width must be at least 1 and num_classes at least 2: got {width}, {num_classes}."
            )
        mean, std = torch.tensor(mean_std, dtype=torch.float32).view(2, 1, 3, 1, 1)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = GhostBatchNorm2d(width)
        blocks, channels = [], width
        for stage in range(4):
            out_channels = width * 2**stage
            blocks.append(ResidualBlock(channels, out_channels, halve=stage > 0))
            blocks.append(ResidualBlock(out_channels, out_channels, halve=False))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = CosineLinear(channels, num_classes) if cosine_head else nn.Linear(channels, num_classes)
        if mirrored:
            mirrored_filters(self, HalvedMirroredConv2d)

    @property
    def num_classes(self):
        return self.head.out_features

    @property
    def width(self):
        return self.conv.out_channels

    def features(self, x):
        """Pooled features: (n, 3, height, width) pixels from 0 to 255 -> (n, 8 x width), of a mirrored network (n, 4 x width)."""
        x = torch.sub(x, self.mean) / self.std  # float32
        x = F.relu(self.norm(self.conv(x)))
        # On CUDA a plain mean has a deterministic gradient. That of adaptive pooling adds atomically.
        features = self.blocks(x).mean(dim=(2, 3))
        # The second half of the channels are the mirrored partners of the first.
        return features.unflatten(1, (2, -1)).mean(dim=1) if self.mirrored else features

    def forward(self, x):
        """Logits: (n, 3, height, width) pixels from 0 to 255, uint8 or float -> (n, num_classes)."""
        return self.head(self.features(x))


def create_classifier(num_classes, width, mean_std, seed, device=None, cosine_head=False, mirrored=False):
    """A :class:`ResNet18` whose initial weights depend only on its shape and on ``seed``.

    Parameters
    ----------
    num_classes, width, mean_std
        See :class:`ResNet18`.
    seed : int
        Of the initial weights. They are the same on every device.
    device : str or torch.device, optional
        Where the network is put, and so where it is trained and evaluated. Default: the fastest there is.
    cosine_head, mirrored : bool, default False
        See :class:`ResNet18`.

    Returns
    -------
    ResNet18
    """
    with seeded(derive_seed(seed, 0)):
        return ResNet18(num_classes, width, mean_std, cosine_head, mirrored).to(choose_device(device))


def channel_statistics(X):
    """Mean and standard deviation of each colour channel.

    Parameters
    ----------
    X : ndarray of uint8, shape (n, height, width, 3)

    Raises
    ------
    TypeError, ValueError
        If ``X`` is no such array.

    Returns
    -------
    mean, std : lists of 3 floats
        In pixel values. The deviation is at least 1, so that images of a single colour can be normalised.
    """
    X = check_pixels(X)
    # The histogram of the 256 values gives exact sums without a float copy of the images.
    values = np.arange(256)
    mean, std = [], []
    for channel in range(3):
        share = np.bincount(X[..., channel].ravel(), minlength=256) / X[..., channel].size
        mean.append(float(share @ values))
        std.append(max(float(np.sqrt(share @ values**2 - mean[-1] ** 2)), 1.0))
    return mean, std


# --- Files --------------------------------------------------------------------------------------


def save_classifier(model, path):
    """Write a network's weights and shape, atomically.

    Parameters
    ----------
    model : ResNet18
    path : path

    Raises
    ------
    OSError
        If the folder is not writable or the disk is full.
    ValueError
        If a weight is not finite. Nothing is written.
    """
    content = {
        "num_classes": model.num_classes,
        "width": model.width,
        "downsampling": model.downsampling,
        "cosine_head": isinstance(model.head, CosineLinear),
        "mirrored": model.mirrored,
        "model": model.state_dict(),
    }
    require_finite(content["model"], "The classifier's weights", "Train it again.")
    save_torch_file(path, content)


def load_classifier(path, device=None):
    """Read a network that :func:`save_classifier` wrote. The file is never unpickled as code.

    Parameters
    ----------
    path : path
    device : str or torch.device, optional
        Where the network is put. Default: the fastest there is.

    Returns
    -------
    ResNet18
        In evaluation mode.

    Raises
    ------
    FileNotFoundError
    ValueError
        If the file is damaged, holds something else, or has a weight that is not finite.
    """
    content = load_torch_file(path, {"num_classes", "width", "downsampling", "model"})
    if content["downsampling"] != ResNet18.downsampling:
        raise ValueError(
            f"{path} holds a network with {content['downsampling']} instead of {ResNet18.downsampling}. "
            "Remove it and run again."
        )
    try:
        # Files from before there was a choice have a linear head and usual filters.
        kind = {name: content.get(name, False) for name in ("cosine_head", "mirrored")}
        model = ResNet18(content["num_classes"], content["width"], **kind)
        model.load_state_dict(content["model"])
    except Exception as error:  # what PyTorch raises depends on what is wrong
        reason = " ".join(str(error).split())
        filters = "filters in mirrored pairs" if content.get("mirrored", False) else "usual filters"
        raise ValueError(
            f"{path} does not fit a ResNet-18 of width {content['width']} with {filters}: {reason[:200]}. Remove it "
            "and run again."
        ) from error
    require_finite(content["model"], f"The weights in {path}", "Remove it and run again.")
    return model.to(choose_device(device)).eval()


# --- Evaluation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Outcome of :func:`evaluate_classifier`.

    Attributes
    ----------
    loss : float
        Mean cross-entropy in nats.
    predictions : ndarray of int64, shape (n,)
        The class with the largest logit of each image.
    logits : ndarray of float32, shape (n, num_classes)
    """

    loss: float
    predictions: np.ndarray
    logits: np.ndarray


def evaluate_classifier(model, X, y, *, batch_size=128):
    """Compute loss and predictions on images, on the device that the model is on.

    For test-time augmentation, average the logits of several calls, for example on ``X`` and on its mirror
    images ``X[:, :, ::-1]``.

    Parameters
    ----------
    model : ResNet18
        It is put into channels_last order. Its training or evaluation mode is left as it was.
    X : ndarray of uint8, shape (n, height, width, 3)
    y : ndarray of int, shape (n,)
        The true classes, for the loss.
    batch_size : int, default 128
        Images that pass through the network at once. Small batches fit a CPU's cache.

    Returns
    -------
    Evaluation

    Raises
    ------
    TypeError, ValueError
        If ``X`` and ``y`` are not images with labels (see :func:`Checks.check_images`), or a logit is not finite.
    """
    X, y = check_images(X, y)
    check_labels(y, model.num_classes)
    logits = predict_logits(model, X, batch_size=batch_size)
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(np.ascontiguousarray(y))).item()
    return Evaluation(loss, logits.argmax(axis=1), logits)


def predict_logits(model, X, *, batch_size=128):
    """Compute the logits of images whose classes need not be known, on the device that the model is on.

    ``predict_logits(model, X).argmax(axis=1)`` are the predicted classes.

    Parameters
    ----------
    model : ResNet18
        It is put into channels_last order. Its training or evaluation mode is left as it was.
    X : ndarray of uint8, shape (n, height, width, 3)
    batch_size : int, default 128
        Images that pass through the network at once. Small batches fit a CPU's cache.

    Returns
    -------
    ndarray of float32, shape (n, num_classes)

    Raises
    ------
    TypeError, ValueError
        If ``X`` are not images (see :func:`Checks.check_pixels`), or a logit is not finite.
    """
    X = np.ascontiguousarray(check_pixels(X))
    model.to(memory_format=torch.channels_last)
    images = torch.from_numpy(X).to(next(model.parameters()).device)
    logits = _outputs(model, model, images, batch_size)
    cure = "Its weights may be damaged: train or load it again."
    require_finite(logits, "Logits of the classifier", cure)  # argmax takes NaN for class 0
    return logits.numpy()


def extract_features(model, X):
    """Features of images: what the last layer of a network gets.

    Parameters
    ----------
    model : ResNet18
        Its training or evaluation mode is left as it was.
    X : ndarray of uint8, shape (n, height, width, 3)

    Returns
    -------
    tensor of float32, shape (n, d)
        On the CPU. d is 8 x width, of a network with mirrored filters 4 x width.
    """
    images = torch.from_numpy(np.ascontiguousarray(check_pixels(X)))
    return _outputs(model, model.features, images, batch_size=128)


def _outputs(model, function, images, batch_size):
    """Outputs of the model or of a part of it for images (n, height, width, 3), in evaluation mode: float32, on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.inference_mode(), mixed_precision(device):
        batches = images.permute(0, 3, 1, 2).split(batch_size)
        parts = [function(batch.to(device)).float() for batch in batches]
    model.train(was_training)
    return torch.cat(parts).cpu()


class EpochEvaluator:
    """Evaluates on a test set after some epochs, for the learning curves. It decides nothing.

    Parameters
    ----------
    X, y : ndarrays
        Test images and labels, as for :func:`evaluate_classifier`.
    minority_classes : sequence of int
        Their mean recall is recorded, 0 if there are none.
    steps : int
        Number of steps of the training.
    evaluations : int
        How often to evaluate: after the epochs that reach equal parts of the steps. If there are fewer epochs, after each.

    Raises
    ------
    TypeError, ValueError
        If ``X`` and ``y`` are not images with labels, or if a minority class has no test image.
    """

    def __init__(self, X, y, minority_classes, *, steps, evaluations):
        self.X, self.y = map(np.ascontiguousarray, check_images(X, y))
        if missing := set(minority_classes) - set(self.y.tolist()):
            raise ValueError(f"The test set has no image of the minority classes {sorted(missing)}.")
        self.minority_classes = tuple(minority_classes)
        self.steps, self.evaluations = steps, evaluations

    def is_due(self, epoch, step):
        """Whether to evaluate after this epoch, counted from 1, which ended after ``step`` steps in all: a bool."""
        # All epochs but the last one have equally many steps, and the last one is always due.
        parts, parts_before = (n * self.evaluations // self.steps for n in (step, step - step // epoch))
        return step == self.steps or parts > parts_before

    def __call__(self, model, record):
        """``test_loss``, ``test_accuracy``, ``test_minority_recall`` and ``seconds_of_test``, or {} if none is due."""
        if not self.is_due(record["epoch"], record["step"]):
            return {}
        started = time.perf_counter()
        evaluation = evaluate_classifier(model, self.X, self.y)
        right = evaluation.predictions == self.y
        recalls = [right[self.y == c].mean() for c in self.minority_classes]
        return {
            "test_loss": evaluation.loss,
            "test_accuracy": float(right.mean()),
            "test_minority_recall": float(np.mean(recalls or [0])),  # over classes, not over images
            "seconds_of_test": time.perf_counter() - started,
        }
