"""A trained model and text to judge it on, for commands that measure."""

from typing import Any, Literal, NamedTuple

import torch

from lightning_dsmoe.analysis import HeldOut, held_out
from lightning_dsmoe.data.tokenizers import Tokenizer
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel, SwitchPoints, compile_sparse, load_decoder
from lightning_dsmoe.inference.checkpoint import LoadedDecoder
from lightning_dsmoe.metrics import ParameterCounts, count_parameters
from lightning_dsmoe.routing import SelectionPlan

_BATCH_TOKENS = 8192
_MOST_LOGITS = 2**26  # of a batch, 256 MiB in float32


class Trained(NamedTuple):
    """A model that runs any plan, the parameters of its decoder, text, and its tokenizer."""

    model: SparseModel
    counts: ParameterCounts
    text: HeldOut
    tokenizer: Tokenizer


def open_trained(ckpt_path: str, *, device: str | None = None, **options: Any) -> Trained:
    """Load a checkpoint and windows of text.

    Args:
        ckpt_path: checkpoint of `fit`.
        device: where to run, such as cpu or cuda:1; by default a CUDA GPU if there is one.
        options: of the text, see `text_for`.

    Raises:
        ValueError: if the checkpoint or the text is not fit for it, or there is no such device.
    """
    place = _device(device)
    loaded = load_decoder(ckpt_path)
    text = text_for(loaded, **options)
    counts = count_parameters(loaded.decoder)
    model = any_plan(loaded.decoder).to(place)
    return Trained(model, counts, text.to(place), tokenizer_of(loaded))


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
    files: str | list[str] | None = None,
    *,
    split: Literal["val", "test"] = "val",
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    context: int | None = None,
    max_tokens: int = 100_000,
    batch_tokens: int | None = None,
) -> HeldOut:
    """Windows of text for a loaded checkpoint.

    Args:
        loaded: a checkpoint.
        files: text files as in training; without it the Python sources of the standard library.
        split: part of the text to use.
        val_fraction: share of the text in the validation split.
        test_fraction: share of the text in the test split.
        context: tokens in a window; by default as in training.
        max_tokens: tokens to use at the most.
        batch_tokens: tokens that run at once; by default 8,192, or fewer of a large vocabulary.

    Raises:
        ValueError: if the checkpoint has no tokenizer or the text is too short.
    """
    tokenizer = tokenizer_of(loaded)
    return held_out(
        tokenizer,
        files,
        context=context or loaded.context or 128,
        split=split,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens or min(_BATCH_TOKENS, _MOST_LOGITS // tokenizer.vocab_size),
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError):
        pass
    raise ValueError(f"device must be cpu or a CUDA GPU of this machine, got {name!r}")
