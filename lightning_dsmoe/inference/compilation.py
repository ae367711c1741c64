"""Sparse models from trained ones, and from files."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.packing import Quantization, is_packed, pack
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.moved import renamed_options
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.plan import check_plan
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder, fill, load_decoder
from lightning_dsmoe.tokenizers import Tokenizer


@renamed_options(context="context_length")
def compile_sparse(
    model: nn.Module | LoadedDecoder | str | Path,
    plan: SelectionPlan,
    *,
    quantization: Quantization | None = None,
    quantize_head: bool = False,
    switch_points: SwitchPoints = SwitchPoints(),
    context_length: int | None = None,
    tokenizer: Tokenizer | dict[str, Any] | None = None,
) -> SparseModel:
    """Build a model for sparse inference from a trained one, which is not changed.

    Args:
        model: a `Decoder`, or a module with one as `decoder`, such as `DSMoELanguageModel`; the
            path of a checkpoint of `fit`; or a sparse model without 8-bit weights, or its path.
        plan: the experts that run in each layer.
        quantization: "int8" puts the routed experts into 8 bits with bitsandbytes.
        quantize_head: put the last projection into 8 bits too.
        switch_points: numbers of tokens at which the engine changes its mode of running experts;
            `SwitchPoints(gather_up_to=0)` never compiles anything, and the model's `tune` measures
            them.
        context_length: most tokens that the model attends to; None takes that of a checkpoint or
            sparse model, or the decoder's learned positions.
        tokenizer: the tokenizer or its description, kept with the model; None takes that of a
            checkpoint or sparse model.

    Returns:
        The sparse model, on the device of the trained one.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if the plan does not match the model, its weights are in 8 bits already, an
            option is unknown, or a file is invalid.
        TypeError: if the plan is no `SelectionPlan`.
        ImportError: if int8 is wanted and bitsandbytes is not installed.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import SelectionPlan, Threshold, compile_sparse
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=8)
        >>> decoder = Decoder(256, 16, 2, attention=heads, feed_forward=experts)
        >>> model = compile_sparse(decoder, SelectionPlan.uniform(2, experts=Threshold(0.5)))
        >>> model.logits(torch.tensor([[72, 105, 32]])).shape
        torch.Size([1, 3, 256])
    """
    source = _source(model)
    decoder = source.decoder
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization must be None or 'int8', got {quantization!r}")
    check_plan(plan, decoder.n_layers)
    plan.check(*decoder.plan_sizes)
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


def load_sparse(path: str | Path) -> SparseModel:
    """Load a sparse model from its artifact directory; it is data only, verified first.

    Args:
        path: the directory that `SparseModel.save` or the callback `SparseCompile` wrote.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is invalid.

    Examples:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import SelectionPlan, TopK, compile_sparse, load_sparse
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=8)
        >>> decoder = Decoder(256, 16, 2, attention=heads, feed_forward=experts)
        >>> model = compile_sparse(decoder, SelectionPlan.uniform(2, experts=TopK(2)))
        >>> with TemporaryDirectory() as folder:
        ...     model.save(f"{folder}/model")
        ...     loaded = load_sparse(f"{folder}/model")
        >>> loaded.plan == model.plan
        True
    """
    return SparseModel.load(path)


def _source(model: nn.Module | LoadedDecoder | str | Path) -> LoadedDecoder:
    """The decoder to compile, and what is known of its data."""
    if isinstance(model, str | Path):
        model = load_sparse(model) if Path(model).is_dir() else load_decoder(model)
    if isinstance(model, LoadedDecoder):
        return model
    if isinstance(model, SparseModel):
        return LoadedDecoder(_unpacked(model), model.tokenizer_description, model.context_length)
    decoder = model if isinstance(model, Decoder) else getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise ValueError(
            "compile_sparse needs a Decoder, a model with one, a checkpoint or a sparse model, got "
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
