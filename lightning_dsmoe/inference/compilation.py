"""Sparse models from trained ones, and from files."""

import copy
from pathlib import Path
from typing import Any, overload

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.artifact.module_artifact import config_has
from lightning_dsmoe.inference.engine.layers.few_tokens import FewTokens
from lightning_dsmoe.inference.engine.layers.packed_layers import pack_layers
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.packing import Quantization, is_packed, pack
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights, quantize_int8
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.inference.sparse_module import SparseModule
from lightning_dsmoe.moved import renamed_options
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.routing.plan import check_plan
from lightning_dsmoe.routing.routed_layer import is_compiled
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder, fill, load_decoder
from lightning_dsmoe.serialization.sharded_folder import is_complete
from lightning_dsmoe.tokenizers import Tokenizer


@overload
def compile_sparse(
    model: Decoder | LoadedDecoder | str | Path, plan: SelectionPlan, **options: Any
) -> SparseModel: ...


@overload
def compile_sparse(model: nn.Module, plan: SelectionPlan, **options: Any) -> Any: ...


@renamed_options(context="context_length")  # type: ignore[misc]  # overloads without options
def compile_sparse(
    model: nn.Module | LoadedDecoder | str | Path,
    plan: SelectionPlan,
    *,
    quantization: Quantization | None = None,
    quantize_head: bool = False,
    switch_points: SwitchPoints = SwitchPoints(),
    context_length: int | None = None,
    tokenizer: Tokenizer | dict[str, Any] | None = None,
) -> Any:
    """Build a model for sparse inference from a trained one, which is not changed.

    Args:
        model: a `Decoder`, or a module whose parameters are all those of its `decoder`, such as
            `DSMoELanguageModel`; the path of a checkpoint of `fit`; or a sparse model without 8-bit
            weights, or its path. Or any other module with routed layers.
        plan: the experts that run in each layer.
        quantization: "int8" puts the routed experts into 8 bits with bitsandbytes.
        quantize_head: put the last projection of a decoder into 8 bits too.
        switch_points: numbers of tokens at which the mode of running experts changes;
            `SwitchPoints(gather_up_to=0)` never compiles anything, and the `tune` of a decoder's
            sparse model measures them.
        context_length: most tokens that a decoder attends to; None takes that of a checkpoint or
            sparse model, or the decoder's learned positions.
        tokenizer: the tokenizer or its description, kept with a decoder; None takes that of a
            checkpoint or sparse model.

    Returns:
        On the device of the trained model, a `SparseModel` of a decoder, which generates, or a
        `SparseModule` of any other model, which is called as that is.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if the plan does not match the model, its weights are in 8 bits already, it has
            no routed layer or is what `torch.compile` returned, an option is unknown or for other
            models, or a file is invalid.
        TypeError: if the plan is no `SelectionPlan`, or the model none.
        ImportError: if int8 is wanted and bitsandbytes is not installed.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import OutputOnly, SelectionPlan, Threshold, compile_sparse
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=8)
        >>> decoder = Decoder(256, 16, 2, attention=heads, feed_forward=experts)
        >>> model = compile_sparse(decoder, SelectionPlan(experts=Threshold(0.5)))
        >>> model.logits(torch.tensor([[72, 105, 32]])).shape
        torch.Size([1, 3, 256])
        >>> network = nn.Sequential(nn.Linear(3, 16), OutputOnly(experts(16)), nn.Linear(16, 2))
        >>> compile_sparse(network, SelectionPlan(experts=Threshold(0.5)))(torch.randn(20, 3)).shape
        torch.Size([20, 2])
    """
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization must be None or 'int8', got {quantization!r}")
    check_plan(plan)
    if isinstance(model, nn.Module) and not _has_only_a_decoder(model):
        options = {
            "quantize_head": quantize_head or None,
            "context_length": context_length,
            "tokenizer": tokenizer,
        }
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)}: for a Decoder only, got a {type(model).__name__}"
            )
        return _compile_module(model, plan, quantization, switch_points)
    source = _source(model)
    decoder = source.decoder
    decoder.selections(plan)  # raises if it does not fit
    architecture = describe_decoder(decoder)
    decoder = copy.deepcopy(decoder).eval().requires_grad_(False)
    pack(decoder, quantization=quantization, quantize_head=quantize_head)
    return SparseModel(
        decoder,
        plan,
        architecture=architecture,
        quantization=quantization,
        quantize_head=quantize_head,
        switch_points=switch_points,
        context_length=source.context if context_length is None else context_length,
        tokenizer=source.tokenizer if tokenizer is None else tokenizer,
    )


@overload
def load_sparse(path: str | Path) -> SparseModel: ...


@overload
def load_sparse(path: str | Path, model: nn.Module) -> SparseModule: ...


def load_sparse(path: str | Path, model: nn.Module | None = None) -> SparseModel | SparseModule:
    """Load a sparse model from its artifact directory; it is data only, verified first.

    Args:
        path: the directory that `save` of a sparse model or the callback `SparseCompile` wrote.
        model: a model like the one that was compiled, for one that is no `Decoder`: no file holds
            its code. It is not changed.

    Returns:
        The `SparseModel` of a decoder, or the `SparseModule` of another model.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is invalid, or the model is another one, missing, or
            one too many.

    Examples:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import SelectionPlan, TopK, compile_sparse, load_sparse
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=8)
        >>> decoder = Decoder(256, 16, 2, attention=heads, feed_forward=experts)
        >>> model = compile_sparse(decoder, SelectionPlan(experts=TopK(2)))
        >>> with TemporaryDirectory() as folder:
        ...     model.save(f"{folder}/model")
        ...     loaded = load_sparse(f"{folder}/model")
        >>> loaded.plan == model.plan
        True
    """
    if model is None:
        if config_has(Path(path), "module"):
            raise ValueError(
                f"{path} holds weights and a plan, not the code of their model: build that and "
                "give it, load_sparse(path, model=MyModel())"
            )
        return SparseModel.load(path)
    if config_has(Path(path), "architecture"):
        raise ValueError(
            f"{path} is the sparse model of a Decoder, which its files describe: load it without "
            "model="
        )
    _check_trained("load_sparse", model)
    return SparseModule.load(path, model)


def _compile_module(
    model: nn.Module,
    plan: SelectionPlan,
    quantization: Quantization | None,
    switch_points: SwitchPoints,
) -> SparseModule:
    """The sparse model of a model that is no decoder."""
    _check_trained("compile_sparse", model)
    if min(switch_points.gather_up_to, switch_points.grouped_from) < 0:
        raise ValueError(f"switch points must be 0 or more, got {switch_points}")
    selections = plan.selections(routed_layers(model))  # raises if it does not fit
    model = copy.deepcopy(model).eval().requires_grad_(False)
    quantizer = None if quantization is None else quantize_int8
    pack_layers(model, selections, FewTokens(switch_points), quantizer=quantizer)
    return SparseModule(model, plan, quantization=quantization, switch_points=switch_points)


def _check_trained(owner: str, model: nn.Module) -> None:
    """Raise a ValueError unless a module is one with routed layers as it was trained."""
    name = type(model).__name__
    if isinstance(model, SparseModule | SparseModel) or is_packed(model):
        raise ValueError(
            f"{owner} needs the trained model, and this {name} is a sparse one already; run_plan "
            "runs it under another plan"
        )
    if any(map(is_compiled, model.modules())):
        raise ValueError(
            f"{owner} needs a model that is not compiled, and this one was by torch.compile: give "
            "the model from before, and compile the sparse one"
        )
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ValueError(f"{owner} needs the model inside a {name}, its `module`")
    if not routed_layers(model):
        raise ValueError(
            f"{owner} needs a Decoder, a checkpoint, a sparse model, or a module with routed "
            f"layers such as MixtureOfExperts; this {name} has none"
        )


def language_model(model: nn.Module) -> Decoder | None:
    """The decoder of which a module's sparse model is one; None for a model that is no decoder."""
    decoder = model if isinstance(model, Decoder) else getattr(model, "decoder", None)
    return decoder if isinstance(decoder, Decoder) and _has_only_a_decoder(model) else None


def _has_only_a_decoder(model: nn.Module) -> bool:
    """Whether a module is a decoder's, so that the engine for decoders runs all that is sparse."""
    if isinstance(model, Decoder | SparseModel):
        return True
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder):
        return False
    own = set(decoder.parameters())
    return all(parameter in own for parameter in model.parameters())


def _source(model: nn.Module | LoadedDecoder | str | Path) -> LoadedDecoder:
    """The decoder to compile, and what is known of its data."""
    if isinstance(model, str | Path):
        is_artifact = Path(model).is_dir() and not is_complete(Path(model))  # which has shards
        model = SparseModel.load(model) if is_artifact else load_decoder(model)
    if isinstance(model, LoadedDecoder):
        return model
    if isinstance(model, SparseModel):
        return LoadedDecoder(_unpacked(model), model.tokenizer_description, model.context_length)
    decoder = model if isinstance(model, Decoder) else getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise TypeError(
            "compile_sparse needs a module with routed layers, a checkpoint or a sparse model, got "
            f"{type(model).__name__}"
        )
    if is_packed(decoder):
        raise ValueError(
            "this decoder is part of a sparse model: give the sparse model or the trained one"
        )
    return LoadedDecoder(decoder, None, None)


def _unpacked(model: SparseModel) -> Decoder:
    """The decoder of a sparse model with its weights in their original layout."""
    if model.report().quantized or model.quantize_head:
        raise ValueError(
            "the weights of this sparse model are in 8 bits already: give generate another plan, "
            "or compile the trained model"
        )
    decoder = build_decoder(model.architecture)
    state = model.decoder.state_dict()
    for name, module in model.decoder.named_modules():
        if isinstance(module, RowMajorWeights):
            state[f"{name}.weight"] = module()
    fill(decoder, state)
    return decoder
