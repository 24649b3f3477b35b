"""Candidates for a generated data set: drawn, checked, reduced to 32x32, and kept in shards on disk.

A candidate is decided by its class, its index and the settings alone. So it does not matter which process
draws it or when: a run that was ended continues with the candidates whose shards are missing.
"""

import hashlib
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from DiffusionPipelines import SIZE, ModelUnavailableError, Painter, find_preset, load_pipeline
from Downsampling import METHODS, downsample
from ImageSelection import CLIP_MODEL, ClipFilter
from Prompts import fingerprint_of_prompts, make_prompts
from Runtime import atomic_path, derive_seed, save_json

SHARDS = Path("datasets/stable_diffusion_shards")
SHARD_SIZE = 64  # candidates in a file: what a kill can cost each process
MOST_DRAWS = 5  # of one candidate, if the safety checker flags it again and again


# --- What decides an image ----------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that candidates depend on besides their class and index.

    Attributes
    ----------
    preset : str
        A key of :data:`DiffusionPipelines.PRESETS`.
    model : str or None
        Hub id or folder in place of the preset's model.
    steps : int or None
        Denoising steps in place of the preset's.
    size : int
        Height and width in pixels at which images are drawn.
    prompts : str or None
        Grammar in place of the preset's, see ``Prompts.py``.
    lora : str or None
        Folder of an adapter trained with ``LoRATraining.py``.
    strengths : tuple of float
        Empty: images are drawn from text alone. Else each is drawn from a real image, at these strengths
        in turn (see :meth:`DiffusionPipelines.Painter.draw`).
    clip_model : str
        Hub id or folder of the CLIP model that judges the images; ``'auto'``: the usual one if the preset
        wants it; ``'none'``: no judge.
    downsampling : {'area', 'lanczos'}
    seed : int
    """

    preset: str = "fast"
    model: str | None = None
    steps: int | None = None
    size: int = SIZE
    prompts: str | None = None
    lora: str | None = None
    strengths: tuple = ()
    clip_model: str = "auto"
    downsampling: str = "area"
    seed: int = 0

    def completed(self):
        """The same settings with the preset's values in place of None and ``'auto'``, checked."""
        preset = find_preset(self.preset)
        if self.downsampling not in METHODS:
            raise ValueError(
                f"Unknown downsampling {self.downsampling!r}. Choose one of {', '.join(METHODS)}."
            )
        if not all(0 < s <= 1 for s in self.strengths):
            raise ValueError(f"Strengths lie above 0 and up to 1: got {', '.join(map(str, self.strengths))}.")
        if self.seed < 0:
            raise ValueError(f"The seed must not be negative: got {self.seed}.")
        auto = CLIP_MODEL if preset.clip_filter else "none"
        return replace(
            self,
            model=self.model or preset.model,
            steps=preset.steps if self.steps is None else self.steps,
            prompts=self.prompts or preset.prompts,
            strengths=tuple(self.strengths),
            clip_model=auto if self.clip_model == "auto" else self.clip_model,
        )


# DA-Fusion (Trabucco et al. 2024, Effective data augmentation with diffusion models) spreads the strength
# over evenly spaced values rather than tuning one.
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def describe_job(settings, class_name, label, sources=None):
    """Everything that the candidates of a class depend on, as it stands in the shards' ``settings.json``.

    Parameters
    ----------
    settings : GenerationSettings
    class_name : str
    label : int
    sources : ndarray of uint8, optional
        The real images that are drawn anew.

    Returns
    -------
    dict
    """
    settings = settings.completed()
    preset = find_preset(settings.preset)
    job = {"class": class_name, "label": int(label)} | asdict(settings)
    job |= {
        name: getattr(preset, name)
        for name in ("guidance_scale", "guidance_interval", "solver", "tiny_decoder")
    }
    job["words"] = fingerprint_of_prompts(class_name, settings.prompts)
    if settings.lora is not None:
        job["lora_weights"] = _hash_of_adapter(settings.lora)
    if settings.strengths:
        job["sources"] = hashlib.sha256(np.ascontiguousarray(sources).tobytes()).hexdigest()[:12]
    return job


def name_job(job):
    """Folder name of a job, such as ``cat-fast-0f3a9c21``; other settings have another name."""
    text = json.dumps(job, sort_keys=True)
    return f"{job['class']}-{job['preset']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _hash_of_adapter(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelUnavailableError(
            f"There is no adapter (a .safetensors file) in {folder}: train one with LoRATraining.py."
        )
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


# --- Drawing ------------------------------------------------------------------------------------


class CandidateMaker:
    """Draws candidates. The models are loaded when the first one is asked for.

    Parameters
    ----------
    settings : GenerationSettings
    device : str or torch.device, optional
        Default: the fastest there is.
    dtype : torch.dtype, optional
        See :func:`DiffusionPipelines.choose_dtype`.
    batch_size : int, optional
        Default: the preset's.
    """

    def __init__(self, settings, device=None, dtype=None, batch_size=None):
        self.settings = settings.completed()
        self._device, self._dtype, self._batch_size = device, dtype, batch_size

    @cached_property
    def painter(self):
        settings = self.settings
        pipeline = load_pipeline(settings.preset, settings.model, settings.lora, self._device, self._dtype)
        return Painter(pipeline, settings.preset, settings.steps, settings.size, self._batch_size)

    @cached_property
    def clip_filter(self):
        if self.settings.clip_model == "none":
            return None
        return ClipFilter(self.settings.clip_model, device=self._device)

    def make(self, class_name, label, indices, sources=None):
        """Draw the candidates of one shard.

        An image that the model's safety checker flags is drawn again with another seed, at most
        :data:`MOST_DRAWS` times in all.

        Parameters
        ----------
        class_name : str
        label : int
        indices : sequence of int
        sources : ndarray of uint8, shape (n, height, width, 3), optional
            Real images to draw anew; needed if the settings have strengths.

        Returns
        -------
        dict of ndarray
            One row per candidate: ``image`` (uint8, 32x32x3), ``index``, ``prompt``, ``seed`` (of the
            last draw), ``flagged`` (how many draws were), ``usable`` (the last one wasn't), ``margin``
            (CLIP's; NaN without a judge), ``source`` (row in ``sources``; -1 without) and ``strength``
            (NaN without).
        """
        indices = np.asarray(indices)
        n, settings = len(indices), self.settings
        prompts = make_prompts(class_name, int(indices.max()) + 1, settings.seed, settings.prompts)
        prompts = [prompts[i] for i in indices]
        source, strength = np.full(n, -1), np.full(n, np.nan)
        if settings.strengths:
            # Every source once at one strength, then every source at the next: batches share theirs.
            source = indices % len(sources)
            strength = np.array(settings.strengths)[indices // len(sources) % len(settings.strengths)]
        images, seeds, flagged = [None] * n, np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        pending = np.arange(n)
        for attempt in range(MOST_DRAWS):
            seeds[pending] = [derive_seed(settings.seed, label, int(i), attempt) for i in indices[pending]]
            again = []
            for level in dict.fromkeys(strength[pending].astype(str)):  # as text, NaN equals itself
                rows = pending[strength[pending].astype(str) == level]
                drawn, objections = self.painter.draw(
                    [prompts[r] for r in rows],
                    seeds[rows].tolist(),
                    [Image.fromarray(sources[source[r]]) for r in rows] if settings.strengths else None,
                    float(level) if settings.strengths else None,
                )
                for row, image, objection in zip(rows, drawn, objections, strict=True):
                    images[row] = image
                    if objection:
                        flagged[row] += 1
                        again.append(row)
            pending = np.sort(np.array(again, dtype=int))
            if not len(pending):
                break
        usable = np.ones(n, dtype=bool)
        usable[pending] = False
        margin = np.full(n, np.nan, dtype=np.float32)
        if self.clip_filter is not None:
            margin = self.clip_filter.margins(images, class_name)
        return {
            "image": downsample(images, settings.downsampling), "index": indices,
            "prompt": np.array(prompts), "seed": seeds, "flagged": flagged, "usable": usable,
            "margin": margin, "source": source, "strength": strength,
        }  # fmt: skip


# --- Shards -------------------------------------------------------------------------------------


def prepare_shards(folder, job):
    """Create the folder of a job with its ``settings.json``, and clear away what a kill left half-written."""
    folder = Path(folder)
    if not (folder / "settings.json").exists():
        save_json(folder / "settings.json", job)
    for unfinished in folder.glob(".*.npz"):
        unfinished.unlink()


def write_shard(folder, candidates):
    """Write candidates to ``<first index>-<last index>.npz``, atomically."""
    first, last = candidates["index"][[0, -1]]
    with atomic_path(Path(folder) / f"{first:06d}-{last:06d}.npz") as temporary:
        np.savez(temporary, allow_pickle=False, **candidates)


def read_shards(folder, columns=None):
    """Read every candidate that is on disk.

    Parameters
    ----------
    folder : path
    columns : sequence of str, optional
        Which columns to read. Default: all.

    Returns
    -------
    dict of ndarray
        As :meth:`CandidateMaker.make` returns them, in the order of the indices. Empty without shards.

    Raises
    ------
    ValueError
        If a shard is truncated, damaged or another kind of file; it names it.
    """
    shards = []
    for path in sorted(Path(folder).glob("[0-9]*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                shards.append({name: file[name] for name in columns or file.files})
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"The shard {path} is truncated or damaged ({error}). Remove it and run again: only its "
                "images are drawn once more."
            ) from error
    if not shards:
        return {}
    together = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    order = np.argsort(together["index"], kind="stable")
    return {name: column[order] for name, column in together.items()}


def find_missing(folder, count):
    """Indices below ``count`` that no shard has, as lists of at most :data:`SHARD_SIZE` for one shard each.

    The lists begin at multiples of the shard size, so that a run that was ended draws the same batches
    as one that was not.
    """
    present = read_shards(folder, ["index"]).get("index", [])
    missing = np.setdiff1d(np.arange(count), present)
    return [missing[missing // SHARD_SIZE == k].tolist() for k in np.unique(missing // SHARD_SIZE)]
