"""Modules compiled ahead of time (AOTInductor), kept on disk.

A module's weights are inputs of its kernel, so that layers alike share one and no weight is copied:
a model of 12 layers compiled in 12 s rather than 110 s (docs/lab_notes/decoding.md).
"""

import hashlib
import io
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from lightning_dsmoe.files import atomic_path
from lightning_dsmoe.torch_private import compile_ahead, load_compiled

Kernel = Callable[[list[Tensor]], list[Tensor]]
"""Takes the inputs, then the weights; empties the list that it is given, and checks nothing."""

OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
    "assert_indirect_indexing": False,  # experts are numbered by the selection itself
}


class Part(NamedTuple):
    """A module to compile, with example inputs.

    Args:
        module: the module.
        inputs: its inputs.
        dynamic: the inputs whose first size is free, the same one for all.
        dynamic_weights: the weights, numbered as in `tensors_of`, whose first size is free.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    dynamic: frozenset[int]
    dynamic_weights: frozenset[int] = frozenset()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Weights of a module in the order in which its kernel takes them."""
    return [*module.parameters(), *module.buffers()]


def export_part(part: Part) -> ExportedProgram:
    """Trace a part into a graph in which its weights are inputs."""
    size = Dim("size", min=2, max=2**30)
    inputs_vary = tuple({0: size} if i in part.dynamic else None for i in range(len(part.inputs)))
    weights = tensors_of(part.module)
    weights_vary = [
        {0: Dim(f"size_{i}", min=2, max=2**30)} if i in part.dynamic_weights else None
        for i in range(len(weights))
    ]
    return torch.export.export(
        _WithWeights(part.module),
        (part.inputs, weights),
        dynamic_shapes=(inputs_vary, weights_vary),
    )


def kernel_path(program: ExportedProgram) -> Path:
    """Where the kernel of a graph is kept: by the graph, the machine and the version of PyTorch.

    Whatever changes the code of a kernel has to be in the fingerprint: a kernel that is found is
    run, and its inputs are not checked against it.
    """
    inputs = [
        (tuple(map(str, value.shape)), value.stride(), str(value.dtype), str(value.device))
        for value in (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
        if isinstance(value, Tensor)
    ]
    constants = [(name, repr(value.tolist())) for name, value in program.constants.items()]
    fingerprint = (
        program.graph_module.code,
        [str(input) for input in inputs],
        constants,
        *environment(),
        sorted({torch.cuda.get_device_name(value[3]) for value in inputs if "cuda" in value[3]}),
    )
    digest = hashlib.sha256(repr(fingerprint).encode()).hexdigest()
    return kernel_folder() / f"{digest[:40]}.pt2"


def environment() -> tuple[object, ...]:
    """What a kernel depends on besides its graph, on a CPU."""
    return sorted(OPTIONS.items()), torch.__version__, torch.get_num_threads(), _processor()


def kernel_folder() -> Path:
    """`~/.cache/lightning_dsmoe/kernels`, in XDG_CACHE_HOME if that is set."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightning_dsmoe" / "kernels"


def ensure_private_folder(folder: Path) -> None:
    """Make a folder for kernels, which are code that runs, if it is not there.

    Raises:
        PermissionError: if others can write to it, or it cannot be made.
    """
    try:
        # By itself, mkdir(parents=True) leaves the mode of all but the last to the umask.
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise PermissionError(
            f"kernels cannot be kept in {folder} ({error.strerror}): set XDG_CACHE_HOME to another "
            "folder"
        ) from None
    if not only_we_can_write(folder.stat()):
        raise PermissionError(
            f"{folder} is not yours alone to write to, so nothing in it is run: chmod go-w it, or "
            "set XDG_CACHE_HOME to a folder of your own"
        )


def compile_kernel(program: ExportedProgram, path: Path) -> None:
    """Compile a graph into a file that no one else can write to, whole or not at all.

    Raises:
        OSError: if it cannot be written; raised before compiling unless the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o644)
        # Not into the file: where the disk is full, the destructor of PyTorch's writer tries again
        # and ends the process (torch 2.13).
        package = io.BytesIO()
        compile_ahead(program, package, dict(OPTIONS))
        try:
            temporary.write_bytes(package.getbuffer())
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(path.parent)) from None


def load_kernel(path: Path, device: torch.device) -> Kernel:
    """Load a kernel that was compiled on this machine.

    Raises:
        PermissionError: if others can write to the file, for it is code that runs.
        ValueError: if the file is damaged.
    """
    with path.open("rb") as file:
        if not only_we_can_write(os.fstat(file.fileno())):
            raise PermissionError(f"{path} is not yours alone to write to")
        # PyTorch does not look at the check sums, and damaged code may crash when it is run.
        if ZipFile(file).testzip() is not None:
            raise ValueError(f"{path} is damaged")
    index = -1 if device.index is None else device.index
    return load_compiled(path, index)


def only_we_can_write(status: os.stat_result) -> bool:
    """Whether nobody else can write to a file; assumed on Windows, which has no such bits."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _processor() -> str:
    """The processor's name and instruction sets, which the compiler makes use of."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text().splitlines()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


class _WithWeights(nn.Module):
    """A module as a function of its inputs and its weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._call = (module,)  # in a tuple, so that the weights are nobody's parameters
        self._names = [*dict(module.named_parameters()), *dict(module.named_buffers())]

    def forward(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        named = dict(zip(self._names, weights, strict=True))
        return functional_call(self._call[0], named, tuple(inputs))
