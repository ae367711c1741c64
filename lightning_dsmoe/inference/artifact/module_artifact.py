"""The artifact of a model that is not this library's: the same files, for a model the user builds.

No file says how to build the model. So the tensors are compared, by names and shapes, with a copy
of the user's model on the meta device before anything is loaded, and the options of its routed
layers with those of the model that was saved.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_dsmoe.attention import RopeScaling
from lightning_dsmoe.files import read_json
from lightning_dsmoe.finite import check_finite
from lightning_dsmoe.inference.artifact.directory import (
    COMMON_FIELDS,
    read_config,
    read_headers,
    verified_files,
    write_files,
)
from lightning_dsmoe.inference.artifact.hashes import CONFIG, PLAN, WEIGHTS
from lightning_dsmoe.inference.engine.layers.few_tokens import FewTokens
from lightning_dsmoe.inference.engine.layers.packed_layers import pack_layers
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.packing import empty_int8
from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
)
from lightning_dsmoe.reading import ShortText
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.serialization.checkpoint import check_state

_MatrixType = Literal["float64", "float32", "float16", "bfloat16"]
_TYPES = get_args(_MatrixType)
_FIELDS = {
    **COMMON_FIELDS,
    "module": ShortText,  # for people: nothing looks for a class of this name
    "matrix_type": _MatrixType | None,
    "remaining": dict,
    "layers": dict,
}
_OPTIONS = {
    **dict.fromkeys(("gate_scale", "causal", "rope_theta", "qk_norm", "activation")),
    "rope_scaling": None,
    "rotary_fraction": 1.0,
    "norm_eps": None,
}
"""Of a routed layer or its experts: without weights, and yet they change what it computes.

Each has the value that it had before it became an option, which artifacts of that time lack.
"""


class ModuleArtifact(NamedTuple):
    """The content of the artifact directory of any model."""

    model: nn.Module
    plan: SelectionPlan
    config: dict[str, Any]


def config_has(path: Path, field: str) -> bool:
    """Whether the configuration in a directory can be read and has a field.

    It is not verified here: `module` is one of models that their users build, `architecture` one of
    decoders.
    """
    try:
        config = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    except ValueError:  # of which the one who verifies it says more
        return False
    return isinstance(config, dict) and field in config


def write_module(
    path: Path,
    model: nn.Module,
    plan: SelectionPlan,
    config: dict[str, Any],
    *,
    card: str,
    certificate: dict[str, Any] | None = None,
    frontier: Path | None = None,
) -> None:
    """Write the artifact of a packed model; see `write_files`.

    Args:
        path: the directory.
        model: the packed model.
        plan: the experts that run.
        config: how it was packed and where methods change.
        card: the model card.
        certificate: measurements.
        frontier: a picture of loss against active share to copy.

    Raises:
        FileExistsError: if something else than an artifact is at the path.
        ValueError: if the certificate has other hashes, or the artifact could not be read again.
    """
    state = stored_tensors(model)
    config = {
        "module": type(model).__name__[:200],
        "matrix_type": _matrix_type(model),
        "remaining": _remaining(model),
        "layers": _layers(model),
        **config,
    }

    def verify(folder: Path) -> None:
        read_config(folder, _FIELDS)
        check_state(state, read_headers(folder / WEIGHTS, _size(state)))
        own = _buffers_of_its_own(model)
        check_finite({name: tensor for name, tensor in state.items() if name not in own})

    write_files(
        path,
        state,
        plan,
        config,
        verify=verify,
        card=card,
        certificate=certificate,
        frontier=frontier,
    )


def read_module(path: Path, model: nn.Module, *, certified: bool = True) -> ModuleArtifact:
    """Load the artifact of a model that its user built, after verifying all of it.

    Args:
        path: the directory.
        model: a model like the one that was compiled, which is not changed.
        certified: refuse a certificate that belongs to other files; false ignores it.

    Returns:
        A packed copy of the model with the weights of the artifact, plan and configuration.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is invalid, or the model is another one.
    """
    devices = {name: tensor.device for name, tensor in stored_tensors(model).items()}

    def described(path: Path) -> ModuleArtifact:
        config = read_config(path, _FIELDS)
        found = ModuleArtifact(
            on_meta(model), SelectionPlan.from_dict(read_json(path / PLAN)), config
        )
        if config["remaining"] != _remaining(model):
            raise ValueError(f"{path} has other experts removed than the model that was given")
        if changes := _changes(config["layers"], _layers(model)):
            raise ValueError(f"{path} is of another model: {'; '.join(changes[:3])}")
        few_tokens = FewTokens(SwitchPoints(**config["switch_points"]))
        quantizer = None
        if config["quantization"] is not None:
            dtype = getattr(torch, config["matrix_type"] or "float32")
            quantizer = partial(empty_int8, dtype=dtype)
        selections = found.plan.selections(routed_layers(found.model))
        pack_layers(found.model, selections, few_tokens, quantizer=quantizer)
        return found

    def check_header(found: ModuleArtifact, weights: Path) -> None:
        expected = stored_tensors(found.model)
        check_state(expected, read_headers(weights, _size(expected)))

    found = verified_files(path, described, check_header, certified=certified)
    _load(found.model, path / WEIGHTS, devices)
    return found


def _layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the weights of each routed layer do not tell: classes of its parts, and options."""
    found = {}
    for name, layer in routed_layers(model).items():
        experts = getattr(layer, "experts", None)
        parts = {"router": layer.router, "experts": experts}
        options = {
            n: getattr(each, n) for each in (layer, experts) for n in _OPTIONS if hasattr(each, n)
        }
        if isinstance(scaling := options.get("rope_scaling"), RopeScaling):
            options["rope_scaling"] = repr(scaling)
        found[name] = {
            **{part: type(module).__name__ for part, module in parts.items() if module is not None},
            **{
                n: each
                for n, each in options.items()
                if isinstance(each, str | bool | float | None)
            },
        }
    return found


def _changes(before: dict[str, Any], now: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{option} of {name} was {was!r:.80}, is {value!r:.80}"
        for name, options in now.items()
        if isinstance(before.get(name), dict)  # or else the names of tensors differ, too
        for option, value in options.items()
        if (was := before[name].get(option, _OPTIONS.get(option))) != value
    ]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state by name, those under several names once.

    Raises:
        ValueError: if its state holds something else.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"an artifact holds tensors, and {name} is a {type(tensor).__name__}")
        if id(tensor) not in seen:
            found[name] = tensor
        seen.add(id(tensor))
    return found


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, with values in buffers that no file holds."""
    # What is in the memo of `deepcopy` is not copied, and shared tensors stay shared.
    memo: dict[int, Any] = {}
    for tensor in stored_tensors(model).values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _load(model: nn.Module, path: Path, devices: dict[str, torch.device]) -> None:
    """Give a model on the meta device the tensors of a file, shared ones under all their names."""
    with safe_open(path, framework="pt") as file:
        loaded = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    own = _buffers_of_its_own(model)
    check_finite({name: tensor for name, tensor in loaded.items() if name not in own})
    of_empty: dict[int, Tensor] = {}
    for name, empty in stored_tensors(model).items():
        # The scales of 8 bits, which the trained model has not, go where their codes do.
        sibling = f"{name.rpartition('.')[0]}.weight"
        device = devices.get(name, devices.get(sibling, torch.device("cpu")))
        value = loaded[name] if device.type == "meta" else loaded[name].to(device)
        is_parameter = isinstance(empty, nn.Parameter)
        of_empty[id(empty)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    names = model.state_dict(keep_vars=True)
    model.load_state_dict({n: of_empty[id(empty)] for n, empty in names.items()}, assign=True)
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if missing:
        raise ValueError(f"these buffers must be persistent to be restored: {', '.join(missing)}")


def _buffers_of_its_own(model: nn.Module) -> set[str]:
    """Buffers that are no packed weights: masks, for one, may well be infinite."""
    packed = {n for n, m in model.named_modules() if isinstance(m, RowMajorWeights)}
    return {n for n, _ in model.named_buffers() if n.rpartition(".")[0] not in packed}


def _matrix_type(model: nn.Module) -> str | None:
    """The type of the matrices that 8-bit weights give out, None without such weights.

    Raises:
        ValueError: if there are several, or it is none that can be loaded.
    """
    found = {m.out_dtype for m in model.modules() if isinstance(m, Int8RowMajorWeights)}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in found)
    if len(names) > 1 or not set(names) <= set(_TYPES):
        raise ValueError(f"8-bit weights must all be of one type of {_TYPES}, got {names}")
    return names[0] if names else None


def _remaining(model: nn.Module) -> dict[str, list[int]]:
    """The experts that remain in layers where some were removed, by the names of the layers."""
    return {
        name: layer.remaining.tolist()
        for name, layer in routed_layers(model).items()
        if layer.remaining is not None
    }


def _size(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
