"""torch.compile of a network's training pass, where a device waits for launches.

    network = CompiledNetwork(model, device)
    logits = network(images)                    # as model(images)

On CUDA the pass is recorded as a CUDA graph for each size of the images, forwards and backwards. A CPU does not wait
for launches, so nothing is compiled there by default. ``COMPILE_BACKEND`` in the environment chooses another backend of
torch.compile (``inductor`` also merges operators, but takes minutes to compile all sizes), or ``none``.
"""

import contextlib
import os

import torch

from DeviceFaults import kind_and_first_line

TRIALS = 3  # a CUDA graph is recorded in the second pass and replayed in the third


def backend_for(device):
    """Name of torch.compile's backend for a torch.device, or None."""
    wanted = os.environ.get("COMPILE_BACKEND", "auto")
    if wanted == "auto":
        return "cudagraphs" if device.type == "cuda" else None
    return None if wanted == "none" else wanted


class CompiledNetwork:
    """A network in training mode, compiled on CUDA, or if ``COMPILE_BACKEND`` names a backend.

    Whatever cannot be compiled is computed as it is, and a line says so once.

    Parameters
    ----------
    model : nn.Module
        Its parameters and buffers stay where they are.
    device : torch.device

    Attributes
    ----------
    compiled : callable or None
        None: calls go to the model itself.
    """

    def __init__(self, model, device):
        self.model, self.compiled, self._tried = model, None, set()
        self.backend = backend_for(device)
        if self.backend is not None:
            # The arms of a study, each with all sizes, run in one process.
            torch._dynamo.config.recompile_limit = 256
            # One graph for each size: sizes are few, and a CUDA graph has one.
            self.compiled = self._or_nothing(torch.compile, model, backend=self.backend, dynamic=False, fullgraph=True)  # fmt: skip

    def prepare(self, images, key=None, context=contextlib.nullcontext):
        """Compile for images of this size, if that was not tried yet; return whether the network is compiled.

        ``key`` is what else decides the graph, and ``context()`` the context in which the network is called.
        """
        kind = images.shape, images.dtype, key
        if self.compiled is not None and kind not in self._tried:
            self._tried.add(kind)
            if self._or_nothing(self._try, images, context) is None:
                self.compiled = None
                torch._dynamo.reset()  # frees the memory of what was compiled and recorded
        return self.compiled is not None

    def __call__(self, images):
        """The model's output for float or uint8 images."""
        if self.compiled is None:
            return self.model(images)
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(images)

    def _try(self, images, context):
        """Run forward and backward passes whose outcome is thrown away, so that a failure costs nothing."""
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        try:
            with context():
                for _ in range(TRIALS):
                    torch.autograd.grad(self(images).float().sum(), parameters)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(buffers, before)
        return True

    def _or_nothing(self, function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except Exception as error:  # every backend has its own kinds
            print(
                f"The network is not compiled with {self.backend}, which makes training slower, and equal up to rounding: "
                f"{kind_and_first_line(error)}",
                flush=True,
            )
            return None
