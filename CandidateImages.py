"""Candidates for a generated data set: drawn, checked, reduced, and kept in shards on disk.

    maker = CandidateMaker(GenerationSettings("turbo"))
    candidates = maker.make("cat", 3, range(64))     # a dict of arrays with one row per candidate

A candidate depends only on its class, its index and the settings. The data type of the weights is one of them. It
does not matter which process draws a candidate or when. A run that was stopped therefore continues with the
candidates whose shards are missing.

References
----------
Parmar, Zhang and Zhu (2022), On aliased resizing and surprising subtleties in GAN evaluation (reduce with
antialiasing, or the result depends on the library).
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from DeviceFaults import device_faults
from DiffusionPipelines import (
    SIZE,
    ModelUnavailableError,
    check_drawing,
    choose_dtype,
    find_preset,
    load_pipeline,
)
from Files import atomic_path, one_process_at_a_time, require_writable, save_json, user_path
from ImageCache import fingerprint
from ImageSelection import CLIP_MODEL, ClipFilter
from Painter import Painter
from Precision import dtype_name
from Prompts import fingerprint_of_prompts, make_prompts
from Repeatability import derive_seed
from Runtime import choose_device, decide_in_main_process, start_processes

SHARDS = Path("datasets/stable_diffusion_shards")
SHARD_SIZE = 64  # candidates in a file; a killed process loses at most so many
MOST_DRAWS = 5  # of one candidate that the safety checker keeps flagging

# DA-Fusion (Trabucco et al. 2024, Effective data augmentation with diffusion models) uses evenly spaced
# strengths instead of tuning one.
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
DTYPES = ("float16", "bfloat16", "float32")
PIXELS = 32  # as in CIFAR-10
PATIENCE = 60  # seconds; a network's disk may show what another machine wrote only after so long
# Both methods average over all pixels that a small one covers, so neither aliases. Area is the plain mean.
# Lanczos keeps edges a little sharper.
DOWNSAMPLING = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


# --- Settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that candidates depend on, except their class and index.

    Attributes
    ----------
    preset : str
        A key of :data:`DiffusionPipelines.PRESETS`.
    model : str or None
        Hub id or local folder of the pipeline. None: the preset's.
    steps : int or None
        Denoising steps. None: the preset's number.
    size : int
        Height and width in pixels at which images are drawn, a multiple of 8.
    prompts : {None, 'varied', 'reference'}
        Grammar of the prompts, see ``Prompts.py``. None: the preset's.
    lora : str or None
        Folder of an adapter trained with ``LoRATraining.py``. None: no adapter.
    strengths : tuple of float
        If empty, images are drawn from text alone. Otherwise each image starts from a real one, at these
        strengths in turn. Each is above 0 and at most 1, see :meth:`Painter.Painter.draw`.
    clip_model : str
        Hub id or local folder of the CLIP model that judges the images. ``'auto'``:
        :data:`ImageSelection.CLIP_MODEL` if the preset uses CLIP. ``'none'``: images are not judged.
    downsampling : {'area', 'lanczos'}
        How images are reduced, see :func:`downsample`.
    seed : int
        Not negative. It decides the prompts, and the noise that images start from.
    dtype : {None, 'float16', 'bfloat16', 'float32'}
        Data type of the weights. None: :func:`DiffusionPipelines.choose_dtype`.
    pixels : int
        Height and width of the reduced images, from 1 to ``size``.
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
    dtype: str | None = None
    pixels: int = PIXELS

    def completed(self):
        """Return these settings with None and ``'auto'`` replaced by the preset's values, and ``~`` by the home folder.

        Returns
        -------
        GenerationSettings

        Raises
        ------
        ValueError
            If a name is unknown or a number is out of range. No model is loaded to find this out.
        """
        preset = find_preset(self.preset)
        _check_downsampling(self.downsampling)
        if not all(0 < s <= 1 for s in self.strengths):
            raise ValueError(
                f"Strengths must be above 0 and at most 1: got {', '.join(map(str, self.strengths))}."
            )
        if self.seed < 0:
            raise ValueError(f"The seed must not be negative: got {self.seed}.")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"Unknown dtype {self.dtype!r}. Choose one of {', '.join(DTYPES)}.")
        steps = preset.steps if self.steps is None else self.steps
        check_drawing(steps, self.size)
        if not 1 <= self.pixels <= self.size:
            raise ValueError(
                f"Images of {self.size} pixels can be reduced to 1 to {self.size} pixels, not to {self.pixels}."
            )
        auto = CLIP_MODEL if preset.clip_filter else "none"
        return replace(
            self,
            model=os.path.expanduser(self.model or preset.model),
            steps=int(steps),  # plain numbers, because NumPy's have no place in settings.json
            size=int(self.size),
            pixels=int(self.pixels),
            seed=int(self.seed),
            prompts=self.prompts or preset.prompts,
            lora=None if self.lora is None else os.path.expanduser(self.lora),
            strengths=tuple(float(strength) for strength in self.strengths),
            clip_model=auto if self.clip_model == "auto" else os.path.expanduser(self.clip_model),
        )


def name_job(job):
    """Name the folder of a job, such as ``cat-fast-0f3a9c21``. Jobs with other settings get other names.

    Parameters
    ----------
    job : dict
        See :meth:`CandidateMaker.describe_job`.

    Returns
    -------
    str
    """
    text = json.dumps(job, sort_keys=True)
    return f"{job['class']}-{job['preset']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _hash_of_adapter(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelUnavailableError(
            f"There is no adapter (a .safetensors file) in {folder}. Train one with LoRATraining.py."
        )
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


# --- Drawing ------------------------------------------------------------------------------------


class CandidateMaker:
    """Draws candidates. Its models are loaded when they are first needed, and stay loaded.

    Parameters
    ----------
    settings : GenerationSettings, optional
        Default: the preset ``'fast'``.
    device : str or torch.device, optional
        Where the models compute. Default: the fastest device, one GPU per process.
    dtype : torch.dtype, optional
        Data type of the weights. Default: the settings'.
    batch_size : int, optional
        Number of images drawn at the same time. Default: the preset's, or 1 on a CPU.
    shards : path
        Folder for the candidates. Each job gets a folder of its own in it, see :func:`name_job`. ``~`` is the
        home folder.

    Attributes
    ----------
    settings : GenerationSettings
        Completed, see :meth:`GenerationSettings.completed`.
    shards : Path

    Raises
    ------
    ValueError
        If a setting is invalid.
    OSError
        If the folder for the candidates is not writable.
    """

    def __init__(self, settings=None, *, device=None, dtype=None, batch_size=None, shards=SHARDS):
        settings = settings or GenerationSettings()
        if dtype is not None:
            settings = replace(settings, dtype=dtype_name(dtype))
        self.settings = settings.completed()
        check_drawing(self.settings.steps, self.settings.size, batch_size)
        self.shards = user_path(shards)
        require_writable(self.shards / "settings.json")
        self._device, self._batch_size = device, batch_size

    @cached_property
    def device(self):
        """The :class:`torch.device` where the models compute."""
        return start_processes().device if self._device is None else choose_device(self._device)

    @cached_property
    def dtype(self):
        """The :class:`torch.dtype` of the weights."""
        name = self.settings.dtype
        return choose_dtype(self.device) if name is None else getattr(torch, name)

    @cached_property
    def painter(self):
        """The :class:`Painter.Painter` with the loaded pipeline."""
        settings = self.settings
        pipeline = load_pipeline(settings.preset, settings.model, settings.lora, self.device, self.dtype)
        return Painter(pipeline, settings.preset, settings.steps, settings.size, self._batch_size)

    @cached_property
    def clip_filter(self):
        """The loaded :class:`ImageSelection.ClipFilter`. None if the settings use no CLIP model."""
        if self.settings.clip_model == "none":
            return None
        return ClipFilter(self.settings.clip_model, self.device)

    def describe_job(self, class_name, label, sources=None):
        """List everything that the candidates of a class depend on. The shards' ``settings.json`` holds this.

        Parameters
        ----------
        class_name : str
        label : int
            Class number.
        sources : ndarray of uint8, shape (n, height, width, 3), optional
            The real images that drawing starts from. Required if the settings have strengths.

        Returns
        -------
        dict of plain values

        Raises
        ------
        ValueError
            If the class has no prompts.
        DiffusionPipelines.ModelUnavailableError
            If the settings name an adapter and its folder holds none.
        """
        settings = self.settings
        preset = find_preset(settings.preset)
        job = {"class": class_name, "label": int(label)} | asdict(settings)
        if job["pixels"] == PIXELS:  # as in jobs from before there was a choice
            del job["pixels"]
        job |= {
            name: getattr(preset, name)
            for name in ("guidance_scale", "guidance_interval", "solver", "tiny_decoder")
        }
        job |= {
            "dtype": dtype_name(self.dtype),
            "words": fingerprint_of_prompts(class_name, settings.prompts),
        }
        if settings.lora is not None:
            job["lora_weights"] = _hash_of_adapter(settings.lora)
        if settings.strengths:
            job["sources"] = fingerprint(sources)[:12]
        return job

    def make(self, class_name, label, indices, sources=None):
        """Draw the candidates of one shard.

        An image that the model's safety checker flags is drawn again with another seed, at most
        :data:`MOST_DRAWS` times in all.

        Parameters
        ----------
        class_name : str
        label : int
            Class number. The seeds depend on it.
        indices : sequence of int
            Numbers of the candidates.
        sources : ndarray of uint8, shape (n, height, width, 3), optional
            Real images that drawing starts from. Required if the settings have strengths.

        Returns
        -------
        dict of ndarray
            One row per candidate: ``image`` (uint8, pixels x pixels x 3), ``index``, ``prompt``, ``seed`` (of the last
            draw), ``flagged`` (number of draws that were flagged), ``usable`` (False if the last draw was
            flagged), ``margin`` (:meth:`ImageSelection.ClipFilter.margins`; NaN without a CLIP model),
            ``source`` (row in ``sources``; -1 without sources) and ``strength`` (NaN without sources).
        """
        indices = np.asarray(indices)
        n, settings = len(indices), self.settings
        prompts = make_prompts(class_name, int(indices.max()) + 1, settings.seed, settings.prompts)
        prompts = [prompts[i] for i in indices]
        source, strength = np.full(n, -1), np.full(n, np.nan)
        if settings.strengths:
            # Every source at the first strength, then every source at the next: a batch has one strength.
            source = indices % len(sources)
            strength = np.array(settings.strengths)[indices // len(sources) % len(settings.strengths)]
        images, seeds, flagged = [None] * n, np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        pending = np.arange(n)
        for attempt in range(MOST_DRAWS):
            seeds[pending] = [derive_seed(settings.seed, label, int(i), attempt) for i in indices[pending]]
            again = []
            for level in dict.fromkeys(strength[pending].astype(str)):  # as text, NaN equals itself
                rows = pending[strength[pending].astype(str) == level]
                drawn, flags = self.painter.draw(
                    [prompts[r] for r in rows],
                    seeds[rows].tolist(),
                    [Image.fromarray(sources[source[r]]) for r in rows] if settings.strengths else None,
                    float(level) if settings.strengths else None,
                )
                for row, image, is_flagged in zip(rows, drawn, flags, strict=True):
                    images[row] = image
                    if is_flagged:
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
            "image": downsample(images, settings.downsampling, settings.pixels), "index": indices,
            "prompt": np.array(prompts), "seed": seeds, "flagged": flagged, "usable": usable,
            "margin": margin, "source": source, "strength": strength,
        }  # fmt: skip


def _check_downsampling(method):
    if method not in DOWNSAMPLING:
        raise ValueError(f"Unknown downsampling {method!r}. Choose one of {', '.join(DOWNSAMPLING)}.")


def downsample(images, method="area", pixels=PIXELS):
    """Reduce images with antialiasing.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
    method : {'area', 'lanczos'}
        A key of :data:`DOWNSAMPLING`: the mean of the covered pixels, or Lanczos' filter.
    pixels : int, default 32
        Height and width of the result.

    Returns
    -------
    ndarray of uint8, shape (n, pixels, pixels, 3)

    Raises
    ------
    ValueError
        For an unknown method.
    """
    _check_downsampling(method)
    small = [np.asarray(im.convert("RGB").resize((pixels, pixels), DOWNSAMPLING[method])) for im in images]
    return np.stack(small) if small else np.empty((0, pixels, pixels, 3), dtype=np.uint8)


# --- Shards -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_shards(folder, job):
    """Context in which this run alone may write the shards of a job. A second run of the job waits.

    The folder is created with its ``settings.json``, and files that a kill left half-written are removed. A folder
    that has no shard at the end is removed.

    Parameters
    ----------
    folder : path
    job : dict
        See :meth:`CandidateMaker.describe_job`.
    """
    folder = Path(folder)
    with one_process_at_a_time(folder, "draws these candidates"):
        if not (folder / "settings.json").exists():
            save_json(folder / "settings.json", job)
        for unfinished in folder.glob(".*.npz"):
            unfinished.unlink()
        try:
            yield
        finally:
            if not any(folder.glob("*.npz")):  # no model could be loaded, say
                with contextlib.suppress(OSError):
                    (folder / "settings.json").unlink()
                    folder.rmdir()


def write_shard(folder, candidates):
    """Write candidates to ``<first index>-<last index>.npz``, atomically.

    Parameters
    ----------
    folder : path
        Of the job.
    candidates : dict of ndarray
        See :meth:`CandidateMaker.make`.

    Raises
    ------
    OSError
        If the folder is not writable or the disk is full.
    """
    first, last = candidates["index"][[0, -1]]
    with atomic_path(Path(folder) / f"{first:06d}-{last:06d}.npz") as temporary:
        np.savez(temporary, allow_pickle=False, **candidates)


def read_shards(folder, columns=None):
    """Read every candidate that is on disk.

    Parameters
    ----------
    folder : path
        Of the job.
    columns : sequence of str, optional
        Which columns to read. Default: all.

    Returns
    -------
    dict of ndarray
        The columns that :meth:`CandidateMaker.make` returns, in the order of the indices. Each index is there
        once, although the shards of two runs may overlap. Empty if there is no shard.

    Raises
    ------
    ValueError
        If a shard is truncated, damaged or another kind of file. The message names it.
    """
    shards = {}
    for path in sorted(Path(folder).glob("[0-9]*.npz")):
        shards[path] = _read_shard(path, columns, next(iter(shards.values()), None))
    if not shards:
        return {}
    together = {
        name: np.concatenate([s[name] for s in shards.values()]) for name in next(iter(shards.values()))
    }
    _, rows = np.unique(together["index"], return_index=True)  # the first of each index, in ascending order
    return {name: column[rows] for name, column in together.items()}


def _read_shard(path, columns, first):
    """The columns of a shard. They must be of the same kind as those of the ``first`` shard, if there is one."""

    def kinds(shard):
        return {name: (column.dtype.kind, column.shape[1:]) for name, column in shard.items()}

    try:
        with np.load(path, allow_pickle=False) as file:
            shard = {name: file[name] for name in columns or file.files}
        if len({len(column) for column in shard.values()}) != 1 or kinds(shard) != kinds(first or shard):
            raise ValueError("its columns do not fit together, or not to those of the other shards")
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds of errors for damaged files
        raise ValueError(
            f"The shard {path} is truncated or damaged ({type(error).__name__}: {error}). Remove it and run again. "
            "Only its images are then drawn again."
        ) from error
    return shard


def find_missing(folder, count):
    """Find the candidates that no shard has yet.

    Parameters
    ----------
    folder : path
        Of the job.
    count : int
        Only indices below this number are looked for.

    Returns
    -------
    list of list of int
        The missing indices, one list per future shard with at most :data:`SHARD_SIZE` indices. The lists
        begin at multiples of the shard size. So a run that was stopped draws the same batches as one that was
        not.
    """
    present = read_shards(folder, ["index"]).get("index", [])
    missing = np.setdiff1d(np.arange(count), present)
    return [missing[missing // SHARD_SIZE == k].tolist() for k in np.unique(missing // SHARD_SIZE)]


def draw_candidates(maker, job, sources, wanted, processes):
    """Draw the candidates of a job that no shard has yet. Several processes share them.

    Parameters
    ----------
    maker : CandidateMaker
    job : dict
        See :meth:`CandidateMaker.describe_job`.
    sources : ndarray of uint8, shape (n, height, width, 3), or None
        Real images that drawing starts from.
    wanted : int
        Number of candidates that there shall be in all.
    processes : accelerate.PartialState
        All its processes must call this function.
    """
    folder = maker.shards / name_job(job)
    groups = decide_in_main_process(partial(find_missing, folder, wanted), processes)
    if groups:
        # One download per machine; the others read its cache.
        with processes.local_main_process_first(), device_faults("Loading the models"):
            _ = maker.painter, maker.clip_filter
    groups = groups[processes.process_index :: processes.num_processes]
    with tqdm(
        total=sum(map(len, groups)), desc=f"{job['class']}, {job['preset']}", unit="image",
        disable=not (groups and processes.is_main_process), mininterval=2,
    ) as progress:  # fmt: skip
        for indices in groups:
            write_shard(folder, maker.make(job["class"], job["label"], indices, sources))
            progress.update(len(indices))
    processes.wait_for_everyone()


def read_candidates(folder, count):
    """Read the first candidates of a job. Waits up to a minute for those that another machine has just written.

    Parameters
    ----------
    folder : path
        Of the job.
    count : int
        How many: those with indices below this number.

    Returns
    -------
    dict of ndarray
        As :meth:`CandidateMaker.make` returns them.

    Raises
    ------
    OSError
        If some of them do not appear.
    ValueError
        If a shard is damaged.
    """
    deadline = time.monotonic() + PATIENCE
    while missing := find_missing(folder, count):
        if time.monotonic() >= deadline:
            found = count - sum(map(len, missing))
            raise OSError(
                f"{folder} has {found:,} of the {count:,} candidates that were drawn. All processes must see the same disk: "
                "put --shards on one and run again. What is there is not drawn again."
            )
        time.sleep(1)
    candidates = read_shards(folder)
    return {name: column[candidates["index"] < count] for name, column in candidates.items()}
