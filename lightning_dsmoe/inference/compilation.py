"""Sparse models out of trained ones, and out of files."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.architecture import describe_decoder
from lightning_dsmoe.inference.engine.packing import Quantization, is_packed, pack
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.routing import SelectionPlan


def compile_sparse(
    model: nn.Module,
    plan: SelectionPlan,
    *,
    quantization: Quantization | None = None,
    quantize_head: bool = False,
    switch_points: SwitchPoints = SwitchPoints(),
    context: int | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> SparseModel:
    """Make a model for sparse inference out of a trained one, which stays as it is.

    Args:
        model: a `Decoder`, or a module with one as `decoder`, such as `DSMoELanguageModel`.
        plan: the experts that run in each layer.
        quantization: "int8" puts the routed experts into 8 bits with bitsandbytes.
        quantize_head: put the last projection into 8 bits too.
        switch_points: numbers of tokens at which one way of running the experts gives way to the
            next; `SwitchPoints(gather_up_to=0)` never compiles anything, and the model's
            `calibrate` measures them.
        context: tokens the model can look back on; None takes the decoder's learned positions.
        tokenizer: description of the tokenizer, kept with the model.

    Raises:
        ValueError: if the plan does not fit the model, the model is compiled already or an option
            is unknown.
        ImportError: if int8 is wanted and bitsandbytes is not installed.
    """
    decoder = model if isinstance(model, Decoder) else getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise ValueError(
            f"compile_sparse needs a Decoder, got {type(model).__name__} without one; "
            "a LightningModule has it after configure_model()"
        )
    if is_packed(decoder):
        raise ValueError(
            "this model is compiled already: give generate another plan, or compile the trained one"
        )
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization must be None or 'int8', got {quantization!r}")
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
        context=context,
        tokenizer=tokenizer,
    )


def load_sparse(path: str | Path) -> SparseModel:
    """Read a sparse model from its artifact directory, checking all of it first.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is not what it should be.
    """
    return SparseModel.load(path)
