"""Whether PyTorch can use the NVIDIA GPU of this machine, and what to do if it cannot.

    python Hardware.py        # says nothing if the GPU is used, or if there is none

``make main`` says this first, because the profile ``auto`` would otherwise compute on the CPU without a word.

References
----------
NVIDIA, CUDA compatibility, https://docs.nvidia.com/deploy/cuda-compatibility (which driver runs which CUDA).
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# torch is imported by the functions that need it: it takes seconds, and a machine without a driver needs none of it.

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # major version of CUDA -> of the oldest driver that runs it
# CUDA 13 has no kernels for GPUs before Turing (compute capability 7.5). PyTorch's last wheels for CUDA 12
# have them, but may have none for Hopper (9.0) and later.
OLDEST_GPU_OF_CUDA_13 = (7, 5)
OLDEST_GPU_WITHOUT_CUDA_12 = (9, 0)
WHEELS = "https://download.pytorch.org/whl/"
WHEELS_OF_CUDA_12, WHEELS_OF_CUDA_13 = WHEELS + "cu126", WHEELS + "cu130"
PROC = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine.

    Attributes
    ----------
    version : str
        Such as ``"550.54.15"``.
    gpus : tuple of str
        Names of the GPUs, at least one.
    capability : tuple of two int, or None
        The lowest compute capability of the GPUs, such as (7, 5) for a T4; None if it is unknown.
    accessible : bool
        Whether this process reaches the GPUs. A container that was started without them sees only the driver.
    """

    version: str
    gpus: tuple
    capability: tuple | None = None
    accessible: bool = True

    @property
    def major(self):
        return int(self.version.split(".")[0])


def find_driver():
    """The :class:`Driver`, from ``nvidia-smi`` or else from ``/proc``; None if there is no NVIDIA GPU."""
    rows = _ask_nvidia_smi("driver_version", "name")
    if rows:
        capabilities = [
            tuple(map(int, row[0].split(".")))
            for row in _ask_nvidia_smi("compute_cap")  # older drivers do not know it
            if re.fullmatch(r"\d+\.\d+", row[0])
        ]
        names = tuple(row[1] for row in rows)
        return Driver(rows[0][0], names, min(capabilities, default=None))
    try:
        version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", (PROC / "version").read_text())
        models = [
            re.search(r"Model:\s*(.*)", path.read_text()) for path in sorted(PROC.glob("gpus/*/information"))
        ]
    except OSError:
        return None
    if version is None or not models:
        return None
    names = tuple(model[1].strip() if model else "NVIDIA GPU" for model in models)
    return Driver(version[1], names, accessible=any(Path("/dev").glob("nvidia[0-9]*")))


def _ask_nvidia_smi(*fields):
    """A list of these fields for each GPU. It is empty if nvidia-smi is missing, fails or finds no GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode:
        return []
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields) and row[0][:1].isdigit()]


def cuda_works():
    """Whether PyTorch finds a CUDA GPU and has kernels for its architecture."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        capability = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError):  # PyTorch finds the GPU, but cannot start it
        return False
    return torch.version.hip is not None or _has_kernels(torch.cuda.get_arch_list(), capability)


def _has_kernels(architectures, capability):
    """Whether one of PyTorch's architectures, such as ``sm_80`` or ``compute_90``, runs on a GPU.

    Machine code (sm) runs on GPUs of the same major version from its minor version on, and an intermediate code
    (compute) on all later GPUs.
    """
    found = [re.match(r"(sm|compute)_(\d+)(\d)", name) for name in architectures]
    known = [(kind, (int(major), int(minor))) for kind, major, minor in (m.groups() for m in found if m)]
    return not known or any(
        made_for <= capability and (kind == "compute" or made_for[0] == capability[0])
        for kind, made_for in known
    )


def unusable_gpu():
    """What keeps PyTorch from using an NVIDIA GPU of this machine, and what to do about it.

    Returns
    -------
    str or None
        Two sentences with the versions of driver and PyTorch. None if a GPU is used or there is none.
    """
    driver = find_driver()
    if driver is None or cuda_works():
        return None
    import torch

    cause, mend = _cause_and_mend(driver)
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return (
        f"This machine has an NVIDIA GPU ({driver.gpus[0]}, driver {driver.version}), but PyTorch "
        f"{torch.__version__} (built for {built_for}) cannot use it: {cause}. {mend}"
    )


def _cause_and_mend(driver):
    """Why PyTorch cannot use the GPU (a clause), and what mends it (a sentence)."""
    import torch

    if torch.version.cuda is None:
        return "this build has no CUDA", _with_wheels(driver)
    oldest = OLDEST_DRIVER.get(int(torch.version.cuda.split(".")[0]), 0)
    if driver.major < oldest:
        return f"CUDA {torch.version.cuda} needs driver {oldest} or newer", _with_wheels(driver)
    if _hides_every_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"), len(driver.gpus)):
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU", "Run: unset CUDA_VISIBLE_DEVICES"
    if not driver.accessible:
        mend = "Start the container with the GPU, for example: docker run --gpus all ..."
        return "this process has no access to it (there is no /dev/nvidia0)", mend
    if torch.cuda.is_available() and driver.capability is not None:
        capability = ".".join(map(str, driver.capability))
        if not _has_kernels(torch.cuda.get_arch_list(), driver.capability):
            return f"it has no kernels for compute capability {capability}", _with_wheels(driver)
    try:
        torch.cuda.init()
        reason = "the reason is unknown"
    except (RuntimeError, AssertionError) as error:
        from DeviceFaults import first_line  # imported here, because it needs PyTorch

        reason = first_line(error)
    return reason, "See what this prints: nvidia-smi"


def _hides_every_gpu(visible, gpus):
    """Whether a value of CUDA_VISIBLE_DEVICES leaves none of the ``gpus``: the list ends at the first wrong number."""
    if visible is None:
        return False
    first = visible.split(",")[0].strip()
    return first == "" or (bool(re.fullmatch(r"-?\d+", first)) and not 0 <= int(first) < gpus)


def _with_wheels(driver):
    """The sentence that names the PyTorch wheels for a driver and its GPUs."""
    capability = driver.capability or OLDEST_GPU_OF_CUDA_13
    if driver.major >= OLDEST_DRIVER[13] and capability >= OLDEST_GPU_OF_CUDA_13:
        return f"Run: make main TORCH_INDEX={WHEELS_OF_CUDA_13}"
    if driver.major >= OLDEST_DRIVER[12] and capability < OLDEST_GPU_WITHOUT_CUDA_12:
        return f"Run: make main TORCH_INDEX={WHEELS_OF_CUDA_12}"
    return f"Install driver {OLDEST_DRIVER[13]} or newer, for example: sudo apt install nvidia-driver-{OLDEST_DRIVER[13]}"


def main():
    if message := unusable_gpu():
        print(f"{message}\nUntil then, the profile auto computes without this GPU.", flush=True)


if __name__ == "__main__":
    main()
