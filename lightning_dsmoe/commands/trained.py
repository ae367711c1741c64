"""A trained model and text to judge it on, for commands that measure."""

from typing import Literal, NamedTuple

from lightning_dsmoe.analysis import HeldOut, held_out
from lightning_dsmoe.data.tokenizers import Tokenizer
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel, SwitchPoints, compile_sparse, load_decoder
from lightning_dsmoe.inference.checkpoint import LoadedDecoder
from lightning_dsmoe.metrics import ParameterCounts, count_parameters
from lightning_dsmoe.routing import SelectionPlan


class Trained(NamedTuple):
    """A model that runs any plan, the parameters of its decoder, text, and its tokenizer."""

    model: SparseModel
    counts: ParameterCounts
    text: HeldOut
    tokenizer: Tokenizer


def open_trained(
    ckpt_path: str,
    files: str | list[str] | None,
    *,
    context: int | None,
    split: Literal["val", "test"],
    val_fraction: float,
    test_fraction: float,
    max_tokens: int,
    batch_tokens: int,
) -> Trained:
    """Load a checkpoint and windows of text, as long as in training unless `context` says so.

    Raises:
        ValueError: if the checkpoint or the text is not fit for it.
    """
    loaded = load_decoder(ckpt_path)
    text = text_for(
        loaded,
        files,
        context=context,
        split=split,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
    )
    counts = count_parameters(loaded.decoder)
    return Trained(any_plan(loaded.decoder), counts, text, tokenizer_of(loaded))


def any_plan(decoder: Decoder) -> SparseModel:
    """A decoder as a model that runs any plan, by default that of all experts."""
    dense = SelectionPlan.uniform(decoder.n_layers)
    return compile_sparse(decoder, dense, switch_points=SwitchPoints(gather_up_to=0))


def tokenizer_of(loaded: LoadedDecoder) -> Tokenizer:
    """The tokenizer of a loaded checkpoint.

    Raises:
        ValueError: if it has none.
    """
    if loaded.tokenizer is None:
        raise ValueError("this model was saved without a tokenizer, so it cannot read text")
    return Tokenizer.from_dict(loaded.tokenizer)


def text_for(
    loaded: LoadedDecoder,
    files: str | list[str] | None,
    *,
    context: int | None,
    split: Literal["val", "test"],
    val_fraction: float,
    test_fraction: float,
    max_tokens: int,
    batch_tokens: int,
) -> HeldOut:
    """Windows of text for a loaded checkpoint, as long as in training unless `context` says so.

    Raises:
        ValueError: if the checkpoint has no tokenizer or the text is too short.
    """
    return held_out(
        tokenizer_of(loaded),
        files,
        context=context or loaded.context or 128,
        split=split,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
    )
