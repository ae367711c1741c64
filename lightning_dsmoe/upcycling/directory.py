"""Upcycled models of transformers as directories.

`config.json` is that of the dense model, and `upcycling.json` describes the mixtures. The weights
are in a folder of their own: `from_pretrained` of transformers, which knows no mixtures, would find
them under `model.safetensors` and silently make random dense layers; so it refuses the directory.

It may come from a stranger: only known classes are built, on the meta device, and names and shapes
of all tensors are compared before any is read.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.files import check_place, read_json
from lightning_dsmoe.finite import check_finite
from lightning_dsmoe.folders import replaced_folder
from lightning_dsmoe.inference.artifact.module_artifact import stored_tensors as tensors_of
from lightning_dsmoe.reading import MAX_LAYERS, Bounds, check_json, check_version
from lightning_dsmoe.routing import OutputOnly, routed_layers
from lightning_dsmoe.serialization.architecture import describe_part, part_factory
from lightning_dsmoe.serialization.class_paths import MAX_SIZE
from lightning_dsmoe.serialization.shards import MAX_BYTES, Part, write_shards
from lightning_dsmoe.serialization.tensor_files import (
    StoredTensor,
    listed,
    stored_tensors,
)
from lightning_dsmoe.upcycling.trust import check_no_kernels

UPCYCLING = "upcycling.json"
WEIGHTS = "weights"
"""The folder of the safetensors."""
FORMAT_VERSION = 1
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_GENERATION = "generation_config.json"
_OURS = {"config.json", UPCYCLING, WEIGHTS, _GENERATION, *_TOKENIZER_FILES}
_LAYER = {
    "d_model": Annotated[int, Bounds(1, MAX_SIZE)],
    "dropout": Annotated[float, Bounds(0, 1)],
    "mixture": {"class_path": str, "init_args": dict},
}
Progress = Callable[[int, int], None]


def save_upcycled(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_BYTES,
) -> None:
    """Write a model of transformers with upcycled layers, to be read by `load_upcycled`.

    Args:
        model: a model of transformers that `upcycle` has changed, with a `config`.
        directory: where to write; an earlier upcycled model there is replaced, and other files
            beside it stay.
        tokenizer_from: directory whose tokenizer files are copied; None for none.
        max_shard_bytes: size of a file of weights, unless one tensor is larger.

    Raises:
        FileExistsError: if something else is at `directory`.
        ValueError: if the model has no upcycled layers, has mixtures that `upcycle` did not make or
            has one in two places, or a weight is not finite.
    """
    path = Path(directory)
    check_free(path)
    layers = _described_layers(model)
    config: Any = getattr(model, "config", None)
    if not layers or config is None:
        raise ValueError(f"{type(model).__name__} is no model of transformers with upcycled layers")
    tensors = tensors_of(model)
    for name, tensor in tensors.items():
        check_finite({name: tensor.detach()})
    with replaced_folder(path, is_ours=_OURS.__contains__) as folder:
        fields = {**config.to_dict(), "architectures": [type(model).__name__]}
        first = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
        fields["dtype"] = str(first.dtype).removeprefix("torch.")
        _write_json(folder / "config.json", fields)
        _write_json(folder / UPCYCLING, {"format_version": FORMAT_VERSION, "layers": layers})
        if (generation := getattr(model, "generation_config", None)) is not None:
            (folder / _GENERATION).write_text(generation.to_json_string(), encoding="utf-8")
        for name in _TOKENIZER_FILES if tokenizer_from is not None else ():
            if (source := Path(str(tokenizer_from), name)).is_file():
                shutil.copyfile(source, folder / name)
        (folder / WEIGHTS).mkdir()
        parts = [_part(name, tensor) for name, tensor in tensors.items()]
        write_shards(folder / WEIGHTS, parts, max_bytes=max_shard_bytes)
        check_free(path)  # once more, since writing takes long


def load_upcycled(
    directory: str | Path, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> Any:
    """Read a model that `save_upcycled` wrote.

    Args:
        directory: of the model.
        trust_remote_code: run the code that the model's configuration names, as transformers may.
        progress: called after every tensor, with their number so far and in all.

    Returns:
        The model of transformers, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: if transformers are not installed.
        ValueError: if a file is not whole or does not match the configuration; all problems at
            once.

    Examples:
        >>> from lightning_dsmoe.upcycling import load_upcycled
        >>> model = load_upcycled("upcycled")  # doctest: +SKIP
        >>> model.generate(tokens, max_new_tokens=20)  # doctest: +SKIP
    """
    path = Path(directory)
    if not is_upcycled(path):
        raise FileNotFoundError(f"{path} is not an upcycled model: it has no {UPCYCLING}")
    description = read_json(path / UPCYCLING)
    check_version(UPCYCLING, description, FORMAT_VERSION)
    check_json(UPCYCLING, description, {"format_version": int, "layers": dict})
    if not 1 <= len(description["layers"]) <= MAX_LAYERS:
        raise ValueError(f"{UPCYCLING}: layers must be 1 to {MAX_LAYERS}")
    stored = stored_tensors(path / WEIGHTS)
    # First all on the meta device: a file of a few kilobytes can name sizes of many gigabytes.
    for place in (torch.device("meta"), _EmptyOnMeta()):
        model = build_empty(path, place, trust_remote_code=trust_remote_code)
        for name, layer in description["layers"].items():
            _put(model, name, layer)
        _check_tensors(model, stored)
    _fill(model, stored, progress)
    read_generation(model, path)
    return model.eval()


def build_empty(path: Path, place: AbstractContextManager[Any], *, trust_remote_code: bool) -> Any:
    """The model of a directory's configuration, made under a context that says where."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ImportError(
            "models of transformers need: pip install 'lightning-dsmoe[hf]'"
        ) from None
    if not trust_remote_code:
        check_no_kernels(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if (n_layers := getattr(config, "num_hidden_layers", 0)) > MAX_LAYERS:
            raise ValueError(f"up to {MAX_LAYERS} layers are allowed, got {n_layers}")
        with place:
            make: Any = AutoModelForCausalLM.from_config
            return make(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{path / 'config.json'} makes no causal model: {reason:.300}") from None


def _check_tensors(model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raise a ValueError listing every tensor that is missing, unknown, or of another shape."""
    expected = tensors_of(model)
    problems = [f"missing {name}" for name in expected if name not in stored]
    problems += [f"unknown {name}" for name in stored if name not in expected]
    problems += [
        f"{name} is {stored[name].shape}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    if problems:
        raise ValueError(f"the tensors are another model's: {listed(problems)}")


def _fill(model: Any, stored: dict[str, StoredTensor], progress: Progress | None) -> None:
    """Read the tensors of a model whose weights are on the meta device, one by one."""
    expected = tensors_of(model)
    names = model.state_dict(keep_vars=True)
    for number, (name, empty) in enumerate(expected.items(), start=1):
        value = stored[name].read()
        check_finite({name: value})
        if isinstance(empty, nn.Parameter):
            value = nn.Parameter(value, requires_grad=empty.requires_grad)
        same = {other: value for other, tensor in names.items() if tensor is empty}
        model.load_state_dict(same, strict=False, assign=True)
        if progress is not None:
            progress(number, len(expected))
    for module in model.modules():  # `assign` gives each tied name a parameter of its own
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(f"{type(module).__name__} keeps its {name} in no file")
    if buffers := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise ValueError(f"these buffers are in no file: {listed(buffers)}")


def is_upcycled(path: Path) -> bool:
    """Whether a directory is that of an upcycled model."""
    return (path / UPCYCLING).is_file()


def check_free(path: Path) -> None:
    """Raise a FileExistsError if something else than an upcycled model is at a path."""
    check_place(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_upcycled(path):
        raise FileExistsError(f"{path} exists and is no upcycled model; choose another path")


def read_generation(model: Any, path: Path) -> None:
    """How the model generates unless told otherwise, such as at which tokens it stops."""
    if not (path / _GENERATION).is_file():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path / _GENERATION} is not one: {reason:.300}") from None


def _described_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The layers that `upcycle` made, by name.

    Raises:
        ValueError: if there are others that `load_upcycled` could not make again.
    """
    layers: dict[str, dict[str, Any]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside and _mixture_in(module) is not None:
            layers[name] = _described(module)
            inside.update(module.modules())
    others = [name for name, layer in routed_layers(model).items() if layer not in inside]
    places = [module for _, module in model.named_modules(remove_duplicate=False)]
    twice = [name for name in layers if places.count(model.get_submodule(name)) > 1]
    if problems := [
        *(f"{name} is no layer that `upcycle` made" for name in others if layers),
        *(f"{name} is in two places" for name in twice),
    ]:
        raise ValueError(f"{type(model).__name__} cannot be written: {listed(problems)}")
    return layers


def _mixture_in(module: nn.Module) -> MixtureOfExperts | None:
    """The mixture of a layer that `upcycle` made."""
    if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.Dropout):
        module = module[0]
    layer = module.layer if isinstance(module, OutputOnly) else None
    return layer if isinstance(layer, MixtureOfExperts) else None


def _described(module: nn.Module) -> dict[str, Any]:
    mixture = _mixture_in(module)
    assert mixture is not None
    dropout: Any = module[1].p if isinstance(module, nn.Sequential) else 0.0
    return {
        "d_model": mixture.d_model,
        "dropout": float(dropout),
        "mixture": describe_part(mixture, "feed_forward"),
    }


def _put(model: nn.Module, name: str, description: object) -> None:
    """Build a described layer on the meta device at its place."""
    layer = check_json(f"{UPCYCLING}: {name!r:.200}", description, _LAYER)
    parent, _, child = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        owner.get_submodule(child or "no name")
    except AttributeError:
        raise ValueError(f"{UPCYCLING}: the model has no module {name!r:.200}") from None
    try:
        with torch.device("meta"):
            mixture = part_factory(layer["mixture"], "feed_forward")(layer["d_model"])
    except (OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"{UPCYCLING}: {name!r:.200} is no mixture: {error}") from None
    if not isinstance(mixture, MixtureOfExperts):
        raise ValueError(f"{UPCYCLING}: {name!r:.200} must be a MixtureOfExperts")
    new: nn.Module = OutputOnly(mixture)
    if layer["dropout"]:
        new = nn.Sequential(new, nn.Dropout(layer["dropout"]))
    owner.register_module(child, new)


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty`, and thus weights, on the meta device.

    Buffers such as the frequencies of rotary positions, which are in no file, are computed from
    numbers and get their values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)


def _part(name: str, tensor: Tensor) -> Part:
    return Part({name: torch.empty_like(tensor, device="meta")}, lambda: [tensor])


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
