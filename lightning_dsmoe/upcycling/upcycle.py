"""Dense models whose feed-forward layers become mixtures of experts, in place.

Shapes: B sequences, T positions, N tokens, D width.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_dsmoe.experts import FeedForward, MixtureOfExperts, neuron_split
from lightning_dsmoe.routing import OutputOnly, RoutedLayer, routed_layers
from lightning_dsmoe.upcycling.dense_mlp import DenseMLP, Find, Probe, looks_like_mlp, recognise
from lightning_dsmoe.upcycling.mixture import mixture_of, router_from_activations

Split = Literal["contiguous", "weights", "activations"]
RouterInit = Literal["zero", "activations"]
Progress = Callable[[int, int], None]
"""Called with the layers that are done, and all of them."""

MAX_TOKENS = 2048
"""Whose activations are looked at in each layer."""
_MLP_NAME = re.compile(r"(mlp|ffn?|feed_?forward|block_sparse_moe|moe)", re.IGNORECASE)
_LISTED = 20


class _Found(NamedTuple):
    """A dense network, all places where its module is, and its copies of one module."""

    names: list[str]
    module: nn.Module
    mlp: DenseMLP


def upcycle(
    model: nn.Module,
    n_experts: int,
    *,
    split: Split = "contiguous",
    tokens: Tensor | Iterable[Any] | None = None,
    router: RouterInit = "zero",
    find: Find | None = None,
    layers: Collection[str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Turn every dense feed-forward layer of a model into a mixture of experts, in place.

    The neurons of a layer are shared out among `n_experts` of equal size, of which all run until a
    plan says otherwise. Attention, positions and everything else stay as they are. With routers of
    zeros the model gives the same outputs as before, to rounding.

    Layers are recognised by what they compute, not by their names: two or three linear layers and
    an activation, gated or not, with or without biases, also fused and as GPT-2's `Conv1D`. Where a
    width is not a multiple of `n_experts`, experts are filled up with neurons of zeros.

    Routers of zeros prefer no expert, so that a plan means little before training. Those made of
    activations prefer the experts that contribute most to a token. Their gates are within about
    0.2 of 1 (standard deviation 0.05), so that the outputs of a layer with all experts change, by
    7.5 % of their norm in the one case that was measured.

    Args:
        model: any module, such as a causal model of transformers.
        n_experts: number of experts E of each layer.
        split: "contiguous" keeps neurons in their order, "weights" puts those of similar input
            weights together, "activations" those that are active for the same tokens.
        tokens: token ids `[B, T]` of a sample text, or batches, each a tensor that the model takes
            or a mapping of its arguments; needed for activations, whose first 2,048 tokens count.
        router: "zero", or "activations" for routers fitted to what each expert contributes.
        find: says what modules compute that are not recognised; it is asked first, and its answer
            is compared with the module, too.
        layers: names of the modules to turn; None for all that look like a feed-forward layer.
        progress: called after every layer, with their number so far and in all.

    Returns:
        Names of the mixtures, as `routed_layers` has them.

    Raises:
        ValueError: if an option is out of range, there is no such layer, or one is not recognised;
            all of these are listed by name and class, and nothing is changed.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import SelectionPlan, TopK, run_plan, upcycle
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model = nn.Sequential(nn.Linear(4, 8), mlp, nn.Linear(8, 2))
        >>> x = torch.randn(5, 4)
        >>> before = model(x)
        >>> upcycle(model, n_experts=4)
        ['1.layer']
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
        >>> with run_plan(model, SelectionPlan(experts=TopK(2))):
        ...     model(x).shape
        torch.Size([5, 2])
    """
    _check_options(n_experts, split, router, tokens)
    found = _find_all(model, find, layers)
    for each in found:
        n_neurons = len(each.mlp.w_out)
        if n_experts > n_neurons:
            raise ValueError(
                f"n_experts={n_experts} is more than the {n_neurons} neurons of {each.names[0]}"
            )
    if "activations" in (split, router):
        inputs = _inputs(model, [each.module for each in found], tokens)
        if missing := [each.names[0] for each, x in zip(found, inputs, strict=True) if not len(x)]:
            raise ValueError(f"no tokens reach {', '.join(missing)}")
    else:
        inputs = [torch.empty(0)] * len(found)
    names = [name for each in found for name in each.names]
    found.reverse()
    inputs.reverse()
    total = len(found)
    while found:  # emptied on the way, so that each dense layer is freed when its mixture is there
        _replace(model, found.pop(), inputs.pop(), n_experts, split, router)
        if progress is not None:
            progress(total - len(found), total)
    made = tuple(f"{name}." for name in names)
    return [name for name in routed_layers(model) if f"{name}.".startswith(made)]


def _check_options(n_experts: int, split: str, router: str, tokens: object) -> None:
    if n_experts < 1:
        raise ValueError(f"n_experts must be at least 1, got {n_experts}")
    for name, value, allowed in (("split", split, Split), ("router", router, RouterInit)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r:.80}")
    if "activations" in (split, router) and tokens is None:
        raise ValueError("activations need the tokens of a sample text, got tokens=None")


def _find_all(model: nn.Module, find: Find | None, layers: Collection[str] | None) -> list[_Found]:
    """The dense layers of a model.

    Raises:
        ValueError: listing all that are not recognised, or shared with other modules.
    """
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{empty[0]} is on the meta device; load the weights first")
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    known = {name for names in places.values() for name in names}
    problems = [f"there is no module {name!r:.200}" for name in sorted(set(layers or ()) - known)]
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in places:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    found: list[_Found] = []
    suspects: dict[str, tuple[nn.Module, str]] = {}
    inside: set[nn.Module] = set()
    for module, names in places.items():
        if module in inside:
            continue
        if isinstance(module, RoutedLayer):
            inside.update(module.modules())
            continue
        if not names[0] or (layers is not None and not set(layers) & set(names)):
            continue
        with torch.enable_grad():
            given = None if find is None else find(names[0], module)
        mlp = given or recognise(module)
        fault = None if mlp is None else Probe(module, mlp).fault(mlp)
        if mlp is not None and fault is None:
            within = set(module.modules())
            inside |= within
            others = [p for p in module.parameters() if not owners[p] <= within]
            if others:
                problems.append(f"{names[0]} ({type(module).__name__}) shares weights with others")
            found.append(_Found(names, module, mlp))
        elif mlp is not None or _is_suspect(names[0], module, asked=layers is not None):
            suspects[names[0]] = module, fault or "it is no two-layer network that is known"
    taken = {id(p) for each in found for p in each.module.parameters()}
    for name, (module, fault) in suspects.items():
        rest = [p for p in module.parameters() if p.ndim > 1 and id(p) not in taken]
        if rest and not any(isinstance(each, RoutedLayer) for each in module.modules()):
            problems.append(f"{name} ({type(module).__name__}): {fault}")
    if not found and not problems:
        problems = ["no feed-forward layer was found in it"]
    if problems:
        more = len(problems) - _LISTED
        listed = "; ".join(problems[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(
            f"{type(model).__name__} was not changed: {listed}. `find` can say what a module "
            "computes, `layers` which ones to turn"
        )
    return found


def _is_suspect(name: str, module: nn.Module, *, asked: bool) -> bool:
    """Whether a module that is not recognised is probably a feed-forward layer."""
    return asked or bool(_MLP_NAME.fullmatch(name.rpartition(".")[2])) or looks_like_mlp(module)


@torch.no_grad()
def _inputs(model: nn.Module, modules: list[nn.Module], tokens: object) -> list[Tensor]:
    """Tokens `[N, D]` as they come into each of some modules, at most `MAX_TOKENS`."""
    inputs: list[list[Tensor]] = [[] for _ in modules]

    def keep(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        room = MAX_TOKENS - sum(map(len, inputs[number]))
        if room > 0:
            inputs[number].append(x.detach().reshape(-1, x.shape[-1])[:room].clone())

    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: keep(number, args, kwargs), with_kwargs=True
        )
        for number, module in enumerate(modules)
    ]
    batches = [tokens] if isinstance(tokens, Tensor | Mapping) else tokens
    try:
        with _evaluating(model):
            for batch in batches:  # type: ignore[attr-defined]
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(batch)
                if all(sum(map(len, each)) >= MAX_TOKENS for each in inputs):
                    break
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(each) if each else torch.empty(0) for each in inputs]


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    """Evaluation mode, after which every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _replace(
    model: nn.Module, found: _Found, x_ND: Tensor, n_experts: int, split: Split, router: RouterInit
) -> None:
    """Put a mixture in the place of a dense network, once both give the same outputs."""
    names, module, mlp = found
    neurons_EF = split_neurons(mlp, n_experts, split, x_ND)
    mixture = mixture_of(mlp, neurons_EF)
    new = _in_place_of(module, mixture, mlp.dropout).train(module.training)
    if (fault := Probe(module, mlp).fault(new)) is not None:
        raise RuntimeError(f"the mixture of {names[0]} is not the layer that it was: {fault}")
    if router == "activations":
        weight_ED = router_from_activations(mlp, neurons_EF, x_ND)
        mixture.router.load_state_dict({"weight": weight_ED})
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, new)


def split_neurons(mlp: DenseMLP, n_experts: int, split: Split, x_ND: Tensor) -> Tensor:
    """Which neurons of a network become which expert.

    Args:
        mlp: the network.
        n_experts: number of experts E.
        split: see `upcycle`.
        x_ND: tokens as they come into the network, for "activations" alone.

    Returns:
        Numbers of neurons `[E, F]`; those beyond the last stand for neurons of zeros.
    """
    if split == "contiguous":
        return neuron_split.contiguous(len(mlp.w_out), n_experts)
    if split == "weights":
        return neuron_split.by_weights(torch.cat(mlp.w_in, dim=1), n_experts)
    with torch.no_grad():
        contribution_NU = mlp.hidden(x_ND.float()) * mlp.w_out.float().norm(dim=1)
    return neuron_split.by_activations(contribution_NU, n_experts)


def _in_place_of(module: nn.Module, mixture: MixtureOfExperts, dropout: float) -> nn.Module:
    """A mixture with the signature of what it replaces."""
    if isinstance(module, FeedForward):
        return mixture
    layer = OutputOnly(mixture)
    return nn.Sequential(layer, nn.Dropout(dropout)) if dropout else layer
