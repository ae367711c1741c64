"""Decoders from training checkpoints, without running any code that a file names.

A checkpoint may come from a stranger, and may be truncated. So the archive is checked before it is
loaded, loading takes plain data only, and sizes are compared with the file's own bytes before any
memory is allocated for them.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.finite import check_finite
from lightning_dsmoe.reading import Size, check_json, check_version
from lightning_dsmoe.serialization.architecture import build_decoder
from lightning_dsmoe.serialization.archive import check_archive, load_archive
from lightning_dsmoe.serialization.tensor_files import listed

FORMAT_VERSION = 1
TEXT_FIELDS = {"tokenizer": dict | None, "context": Size | None}
_PREFIX = "decoder."
_MOST_LEVELS, _MOST_VALUES = 100, 10**6


class LoadedDecoder(NamedTuple):
    """A decoder in evaluation mode, and how its data was prepared; None where that is not known.

    Args:
        decoder: the decoder, on the CPU.
        tokenizer: a description that `Tokenizer.from_dict` reads.
        context: tokens in a training window.
        val_fraction: share of the text in the validation split.
        test_fraction: share of the text in the test split.
    """

    decoder: Decoder
    tokenizer: dict[str, Any] | None
    context: int | None
    val_fraction: float | None = None
    test_fraction: float | None = None


def load_decoder(path: str | Path) -> LoadedDecoder:
    """Load the decoder of a checkpoint written by `DSMoELanguageModel`, on the CPU.

    Args:
        path: the checkpoint, such as `last.ckpt`.

    Returns:
        The decoder in evaluation mode, and how its data was prepared.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, holds more than data, does not match its architecture,
            or a weight is not finite.

    Examples:
        >>> loaded = load_decoder("runs/checkpoints/last.ckpt")  # doctest: +SKIP
        >>> loaded.decoder(torch.zeros(1, 8, dtype=torch.long)).logits.shape  # doctest: +SKIP
        torch.Size([1, 8, 256])
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.get("architecture") is None:
        raise ValueError(
            f"{path} does not hold its architecture, because it is of another model than a Decoder "
            "or a part of it does not keep its options; read it with load_from_checkpoint of the "
            "class that wrote it"
        )
    decoder = build_decoder(checkpoint["architecture"])
    state = {
        name.removeprefix(_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    check_state(decoder.state_dict(), state)
    check_sharing(state)
    check_finite(state)
    fill(decoder, state)
    found = {name: checkpoint.get(name) for name in TEXT_FIELDS}
    text = check_json(str(path), found, TEXT_FIELDS)
    return LoadedDecoder(decoder, text["tokenizer"], text["context"], *_fractions(checkpoint))


def _fractions(checkpoint: Mapping[str, Any]) -> tuple[float, float] | tuple[None, None]:
    """Shares of the text; None for what a data module of another kind may mean by these names."""
    val: Any = checkpoint.get("val_fraction")
    test: Any = checkpoint.get("test_fraction")
    numbers = isinstance(val, int | float) and isinstance(test, int | float)
    return (val, test) if numbers and 0 < val < 1 and 0 <= test < 1 - val else (None, None)


def read_checkpoint(
    path: str | Path | IO[Any],
    *,
    weights_only: bool = True,
    checksums: bool = True,
    map_location: Any = "cpu",
    mmap: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint of `DSMoELanguageModel`, by default onto the CPU; see `read_any`.

    Raises:
        ValueError: also if it is a checkpoint of something else, or of a newer format.
    """
    checkpoint = read_any(
        path, weights_only=weights_only, checksums=checksums, map_location=map_location, mmap=mmap
    )
    check_format(checkpoint, str(path) if isinstance(path, str | Path) else "the checkpoint")
    return checkpoint


def _check_is_one(folder: Path) -> None:
    """Raise a FileNotFoundError that says what a folder is that is not a checkpoint itself."""
    if (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} is a sparse model or one of transformers, not a checkpoint of fit"
        )
    places = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")  # of a run and its versions
    if inside := [path for place in places for path in folder.glob(place)]:
        raise FileNotFoundError(
            f"{folder} is a folder with checkpoints, such as {sorted(inside)[-1]}: name one of them"
        )


def read_any(
    path: str | Path | IO[Any],
    *,
    weights_only: bool = True,
    checksums: bool = True,
    map_location: Any = "cpu",
    mmap: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint of any LightningModule, by default onto the CPU.

    Args:
        path: the file or the folder of a sharded checkpoint; a file may be open, and is rewound.
        weights_only: refuse a file that holds more than data; off, it can run any code.
        checksums: whether to read the whole file first, to find damaged values.
        map_location: device for the tensors, or what else `torch.load` takes.
        mmap: leave the tensors of a named file in there until they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        MemoryError, OSError: if that is why the file, which may be whole, cannot be read.
        ValueError: if the file is damaged, compressed, holds more than data, or is something else.
    """
    if is_folder := isinstance(path, str | Path) and Path(path).is_dir():
        _check_is_one(Path(path))
        from lightning_dsmoe.serialization.sharded_folder import read_folder
    elif isinstance(path, str | Path) and not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    fault = "is damaged or not a checkpoint"
    try:
        if is_folder:
            loaded = read_folder(Path(str(path)), weights_only=weights_only)
        else:
            check_archive(path, checksums=checksums)
            fault = "cannot be read"
            loaded = load_archive(
                path,
                map_location=map_location,
                weights_only=weights_only,
                mmap=mmap and isinstance(path, str | Path),
            )
    except MemoryError:  # which says nothing by itself
        raise MemoryError(f"there is not enough memory to read {path}") from None
    except (OSError, torch.OutOfMemoryError):
        raise  # no fault of the file
    except Exception as error:
        reason = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
        if isinstance(error, UnpicklingError):
            fault = "holds more than data, which could run code when it is read"
        raise ValueError(f"{path} {fault}: {reason:.500}") from None
    if not isinstance(path, str | Path):
        path.seek(0)
    check_nesting(str(path), loaded, most=max(_MOST_VALUES, _n_bytes(path)))
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} is not a checkpoint: it has no state_dict of tensors")
    for name, tensor in state.items():
        if not _is_whole(tensor):
            raise ValueError(f"{path}: {name!r:.200} is not a plain tensor with all of its values")
    if not all(_is_whole(tensor) for tensor in _tensors(loaded.get("optimizer_states"))):
        raise ValueError(f"{path}: the optimizer's state needs plain tensors with all their values")
    if not all(_is_whole(tensor) for tensor in _tensors(loaded)):
        raise ValueError(f"{path} needs plain tensors with all their values")
    checkpoint: dict[str, Any] = loaded
    return checkpoint


def check_nesting(name: str, value: object, *, most: int = _MOST_VALUES) -> None:
    """Raise a ValueError if containers are deeper than any, or hold more values than are allowed.

    In a pickle one container may stand in many places, or inside itself. So a few hundred bytes can
    describe more values than anybody could walk through, compare or print.
    """
    level, n = [value], 0
    for _ in range(_MOST_LEVELS):
        containers = [each for each in level if isinstance(each, dict | list | tuple | set)]
        n += sum(map(len, containers))
        if n > most:
            break
        level = list(chain.from_iterable(containers))  # of dictionaries, the keys
        level += chain.from_iterable(each.values() for each in containers if isinstance(each, dict))
        if not level:
            return
    raise ValueError(f"{name} nests its values too deeply or too often")


def _n_bytes(path: str | Path | IO[Any]) -> int:
    """Bytes of a file, or of all files in a folder: no fewer than the values written into it."""
    if not isinstance(path, str | Path):
        n_bytes = path.seek(0, 2)
        path.seek(0)
        return n_bytes
    place = Path(path)
    files = place.iterdir() if place.is_dir() else [place]
    return sum(each.stat().st_size for each in files)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor has all its values in the file.

    `torch.zeros(1).expand(2**40)` is four bytes in a file, and fills any memory once copied.
    """
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def check_sharing(state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if tensors that share their values would take far more memory copied."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()
    }
    # Tied embeddings are the only weights of a described model that are in its state twice.
    if sum(tensor.nbytes for tensor in state.values()) > 2 * sum(storages.values()):
        raise ValueError("the weights share their values: copies would be larger than the file")


def check_format(checkpoint: Mapping[str, Any], name: str = "the checkpoint") -> None:
    """Raise a ValueError if a checkpoint is not in the format that this version reads."""
    if checkpoint.get("format_version") is None:
        raise ValueError(f"{name} is not a checkpoint of DSMoELanguageModel: no format_version")
    check_version(name, checkpoint, FORMAT_VERSION)


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise one ValueError that lists tensors missing, extra, or of another shape or kind.

    Floating-point types may differ, so that a model can be kept in fewer bits; others may not.
    """
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unknown {' '.join(name.split()):.200}" for name in found if name not in expected]
    for name in (name for name in expected if name in found):
        tensor, other = expected[name], found[name]
        are_floats = tensor.is_floating_point() and other.is_floating_point()
        if other.shape != tensor.shape:
            faults.append(f"{name} is {tuple(other.shape)}, not {tuple(tensor.shape)}")
        elif other.dtype != tensor.dtype and not are_floats:
            faults.append(f"{name} is {other.dtype}, not {tensor.dtype}")
    if faults:
        raise ValueError(f"the weights are another model's: {listed(faults, 40)}")


def check_embeddings(options: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a model's arguments would make larger embeddings than all it has."""
    vocab_size, d_model = options.get("vocab_size", 0), options.get("d_model", 0)
    are_sizes = isinstance(vocab_size, int) and isinstance(d_model, int)
    if are_sizes and vocab_size * d_model > sum(tensor.numel() for tensor in state.values()):
        raise ValueError(
            f"the checkpoint is of another model: its weights are fewer than those of vocab_size="
            f"{vocab_size} and d_model={d_model}"
        )


def fill(decoder: Decoder, state: Mapping[str, Tensor]) -> None:
    """Give a decoder on the meta device its weights, as copies.

    Tensors that are mapped from a file would change, or crash the process, when the file does.

    Raises:
        ValueError: if a part has values that are not in its state, which no file can restore.
    """
    copies = {name: tensor.clone() for name, tensor in state.items()}
    decoder.load_state_dict(copies, strict=False, assign=True)
    if decoder.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    empty = [name for name, buffer in decoder.named_buffers() if buffer.is_meta]
    if empty:
        raise ValueError(f"these buffers must be persistent to be restored: {', '.join(empty)}")
