"""What is exported: a decoder, the experts that run, and what is known of its text."""

from typing import Any, NamedTuple

from torch import nn

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.compilation import language_model
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.serialization.architecture import build_decoder
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder


class ExportSource(NamedTuple):
    """A model to export.

    Args:
        decoder: the decoder; its weights may be views of the model's.
        plan: the experts that run unless another plan is given.
        tokenizer: a description that `Tokenizer.from_dict` reads.
        context_length: most tokens of a text that it was trained on; None where not known.
        quantized: whether some weights were in 8 bits.
    """

    decoder: Decoder
    plan: SelectionPlan
    tokenizer: dict[str, Any] | None = None
    context_length: int | None = None
    quantized: bool = False


def export_source(model: nn.Module | LoadedDecoder) -> ExportSource:
    """The decoder of a model, and what the model knows of it.

    Raises:
        TypeError: if the model is none of those that can be exported.
    """
    if isinstance(model, SparseModel):
        return ExportSource(
            _unpacked(model),
            model.plan,
            model.tokenizer_description,
            model.context_length,
            model.quantization is not None or model.quantize_head,
        )
    if isinstance(model, LoadedDecoder):
        return ExportSource(model.decoder, SelectionPlan(), model.tokenizer, model.context)
    decoder = language_model(model) if isinstance(model, nn.Module) else None
    if decoder is None:
        raise TypeError(
            "export_hf needs a Decoder, a DSMoELanguageModel or a SparseModel of a decoder, got "
            f"{type(model).__name__}; a transformers model writes itself with save_pretrained"
        )
    plan = getattr(model, "plan", None)
    if not isinstance(plan, SelectionPlan):
        own = {name: layer.default_selection for name, layer in routed_layers(decoder).items()}
        plan = SelectionPlan(layers={name: each for name, each in own.items() if each is not None})
    return ExportSource(decoder, plan)


def _unpacked(model: SparseModel) -> Decoder:
    """The decoder of a sparse model as before it was packed; weights in 8 bits as they compute."""
    tied = model.architecture["tie_embeddings"] and not model.quantize_head
    decoder = build_decoder({**model.architecture, "tie_embeddings": tied})
    state = model.decoder.state_dict()
    for name, module in model.decoder.named_modules():
        if isinstance(module, RowMajorWeights):
            state[f"{name}.weight"] = module()
    if model.quantize_head:
        state["head.weight"] = state.pop("head.rows.weight")[0]
    state = {name: state[name] for name in decoder.state_dict()}
    decoder.load_state_dict(state, assign=True)  # views where nothing is in 8 bits
    if tied:
        decoder.head.weight = decoder.embedding.weight
    return decoder
