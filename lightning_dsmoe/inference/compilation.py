"""Sparse models out of trained ones, and out of files."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.packing import Quantization, is_packed, pack
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.plan import check_plan
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder, fill, load_decoder
from lightning_dsmoe.tokenizers import Tokenizer


def compile_sparse(
    model: nn.Module | LoadedDecoder | str | Path,
    plan: SelectionPlan,
    *,
    quantization: Quantization | None = None,
    quantize_head: bool = False,
    switch_points: SwitchPoints = SwitchPoints(),
    context: int | None = None,
    tokenizer: Tokenizer | dict[str, Any] | None = None,
) -> SparseModel:
    """Make a model for sparse inference out of a trained one, which stays as it is.

    Args:
        model: a `Decoder`, or a module with one as `decoder`, such as `DSMoELanguageModel`; the
            path of a checkpoint of `fit`; or a sparse model without 8-bit weights, or its path.
        plan: the experts that run in each layer.
        quantization: "int8" puts the routed experts into 8 bits with bitsandbytes.
        quantize_head: put the last projection into 8 bits too.
        switch_points: numbers of tokens at which one way of running the experts gives way to the
            next; `SwitchPoints(gather_up_to=0)` never compiles anything, and the model's
            `calibrate` measures them.
        context: tokens the model can look back on; None takes that of a checkpoint or sparse model,
            or the decoder's learned positions.
        tokenizer: the tokenizer or its description, kept with the model; None takes that of a
            checkpoint or sparse model.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if the plan does not fit the model, its weights are in 8 bits already, an option
            is unknown, or a file is not what it should be.
        TypeError: if the plan is none.
        ImportError: if int8 is wanted and bitsandbytes is not installed.
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
        context=source.context if context is None else context,
        tokenizer=source.tokenizer if tokenizer is None else tokenizer,
    )


def load_sparse(path: str | Path) -> SparseModel:
    """Read a sparse model from its artifact directory, checking all of it first.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is not what it should be.
    """
    return SparseModel.load(path)


def _source(model: nn.Module | LoadedDecoder | str | Path) -> LoadedDecoder:
    """The decoder to compile, and what is known of its text."""
    if isinstance(model, str | Path):
        model = load_sparse(model) if Path(model).is_dir() else load_decoder(model)
    if isinstance(model, LoadedDecoder):
        return model
    if isinstance(model, SparseModel):
        return LoadedDecoder(_unpacked(model), model.tokenizer_description, model.context)
    decoder = model if isinstance(model, Decoder) else getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise ValueError(
            "compile_sparse needs a Decoder, a model with one, a checkpoint or a sparse model, got "
            f"{type(model).__name__}"
        )
    if is_packed(decoder):
        raise ValueError(
            "this decoder is that of a sparse model: give the sparse model itself, or the trained "
            "one"
        )
    return LoadedDecoder(decoder, None, None)


def _unpacked(model: SparseModel) -> Decoder:
    """The decoder that a sparse model was made of."""
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
