"""Parts of a model as bytes, for another process to compile, or to know them again."""

import hashlib
import io
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsmoe import files
from lightning_dsmoe.inference.engine.decode.aot_cache import Part, environment, tensors_of

# Packages whose code is known: this library's by its files, the others by their versions.
_KNOWN = {"lightning_dsmoe", "torch", "builtins", "collections", "copyreg", "functools", "_codecs"}


class CannotBePacked(Exception):
    """Parts cannot be pickled, or have code of the main program, which no other process has."""


class PackedParts(NamedTuple):
    """Parts as bytes.

    Args:
        name: which parts, on this machine; None if they have code of others than this library and
            PyTorch, which may change without their name.
        task: what `unpack_parts` takes.
    """

    name: str | None
    task: bytes


def pack_parts(parts: Sequence[Part]) -> PackedParts:
    """Pack parts with the layouts of their weights and inputs, but not their values.

    Raises:
        CannotBePacked: if they cannot be told to another process.
    """
    file = io.BytesIO()
    packer = _Packer(file, parts)
    try:
        packer.dump(list(parts))
    except Exception as error:
        raise CannotBePacked from error
    if "__main__" in packer.packages:
        raise CannotBePacked
    known = (file.getvalue(), environment(), _own_code(), torch.__version__)
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:40]
    own_name = name if packer.packages <= _KNOWN else None
    header = own_name, _own_code(), torch.get_num_threads(), packer.sizes
    return PackedParts(own_name, pickle.dumps(header) + file.getvalue())


def unpack_parts(file: Any) -> tuple[str | None, list[Part]]:
    """The name and the parts, in a process with as many threads for PyTorch as the first one.

    Args:
        file: what was packed, to read from.
    """
    name, code, n_threads, sizes = pickle.load(file)
    torch.set_num_threads(n_threads)
    parts: list[Part] = _Unpacker(file, sizes).load()
    # Files that were edited since the first process read them make other kernels.
    return name if code == _own_code() else None, parts


@cache
def _own_code() -> str:
    """Fingerprint of this library's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(files.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Packer(pickle.Pickler):
    """Pickles layouts in place of weights and inputs; other tensors are constants of a graph."""

    def __init__(self, file: io.BytesIO, parts: Sequence[Part]) -> None:
        super().__init__(file)
        tensors = [t for part in parts for t in (*part.inputs, *tensors_of(part.module))]
        self._numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self._free = {id(tensors_of(p.module)[i]) for p in parts for i in p.dynamic_weights}
        self.sizes: dict[int, int] = {}
        """First sizes that are free, by the number of the tensor: no part of a name."""
        self.packages: set[str] = set()

    def persistent_id(self, value: Any) -> Any:
        """A tensor's number and layout; it is asked for everything, classes and functions too."""
        module = getattr(value, "__module__", None)
        if isinstance(module, str):
            self.packages.add(module.partition(".")[0])
        if type(value) not in (Tensor, nn.Parameter) or id(value) not in self._numbers:
            return None
        number, shape = self._numbers[id(value)], tuple(value.shape)
        if id(value) in self._free:
            self.sizes[number], shape = shape[0], shape[1:]
        layout = shape, value.stride(), value.dtype, value.device
        return number, layout, isinstance(value, nn.Parameter)


class _Unpacker(pickle.Unpickler):
    """Makes tensors of any values of the layouts, whose memory is never touched."""

    def __init__(self, file: Any, sizes: dict[int, int]) -> None:
        super().__init__(file)
        self._sizes = sizes
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, identity: Any) -> Tensor:
        """The tensor of a number."""
        number, (shape, stride, dtype, device), is_parameter = identity
        if number in self._sizes:
            shape = self._sizes[number], *shape
        if number not in self._tensors:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            self._tensors[number] = nn.Parameter(tensor, False) if is_parameter else tensor
        return self._tensors[number]
