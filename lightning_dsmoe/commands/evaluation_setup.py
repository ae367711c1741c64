"""A trained model and held-out text, for the commands that measure."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from lightning_dsmoe.analysis import HeldOut, held_out
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel, SwitchPoints, compile_sparse, load_decoder
from lightning_dsmoe.inference.artifact.hashes import PLAN
from lightning_dsmoe.metrics import ParameterCounts, count_parameters
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder
from lightning_dsmoe.tokenizers import Tokenizer

Given = TypeVar("Given")

VAL_FRACTION, TEST_FRACTION, CONTEXT = 0.1, 0.0, 128
"""Splits of the text and tokens of a window, where those of training are unknown."""
_BATCH_TOKENS = 8192
_MOST_NUMBERS = 2**26  # logits or gates of a batch, 256 MiB in float32
_MOST_LOGITS_OF_A_WINDOW = 2**30


class Trained(NamedTuple):
    """A model that runs any plan, the parameter counts of its decoder, text, and its tokenizer."""

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
        ValueError: if the checkpoint or the text is invalid, or there is no such device.
    """
    place = usable_device(device)
    loaded = load_decoder(ckpt_path)
    text = text_for(loaded, **options)
    counts = count_parameters(loaded.decoder)
    model = all_experts_model(loaded.decoder).to(place)
    return Trained(model, counts, text.to(place), tokenizer_of(loaded))


def all_experts_model(source: Decoder | LoadedDecoder) -> SparseModel:
    """A model that runs all experts, or those of a plan that is given with a text.

    It reads a text of any length and has no tokenizer, unless its source is a loaded checkpoint.
    """
    # One text, or one pass over it, is done before a step for few tokens would be compiled.
    points = SwitchPoints(gather_up_to=0)
    return compile_sparse(source, SelectionPlan(), switch_points=points)


def tokenizer_of(loaded: LoadedDecoder) -> Tokenizer:
    """The tokenizer of a loaded checkpoint.

    Raises:
        ValueError: if it has none.
    """
    if loaded.tokenizer is None:
        raise ValueError("this model was saved without a tokenizer, so it cannot read text")
    return Tokenizer.from_dict(loaded.tokenizer)


def read_plan(path: str, decoder: Decoder) -> SelectionPlan:
    """Read a plan from its file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a plan, or one of another model.
    """
    if not Path(path).is_file():
        inside = Path(path, PLAN)
        there = f"{path} is a folder; its plan is {inside}" if inside.is_file() else ""
        raise FileNotFoundError(there or f"no plan at {path}")
    plan = SelectionPlan.load(path)
    try:
        decoder.selections(plan)
    except ValueError as error:
        raise ValueError(f"{path} is not a plan for this model: {error}") from None
    return plan


def tokens_at_once(decoder: Decoder) -> int:
    """Batch size in tokens for which a model's logits, or its gates, fit into memory."""
    gates = sum(n for kind in decoder.plan_sizes for n in kind if n is not None)
    return max(1, _MOST_NUMBERS // max(decoder.vocab_size, gates))


def text_for(
    loaded: LoadedDecoder,
    files: str | list[str] | None = None,
    *,
    split: Literal["val", "test"] = "val",
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    context: int | None = None,
    max_tokens: int = 100_000,
    batch_tokens: int | None = None,
) -> HeldOut:
    """Windows of text for a loaded checkpoint.

    Args:
        loaded: a checkpoint.
        files: text files as in training; by default the Python sources of the standard library.
        split: part of the text to use.
        val_fraction: share of the text in the validation split; by default as in training.
        test_fraction: share of the text in the test split; by default as in training.
        context: tokens in a window; by default as in training.
        max_tokens: maximum number of tokens.
        batch_tokens: batch size in tokens; by default 8,192, or fewer for a large model.

    Raises:
        ValueError: if the checkpoint has no tokenizer or that of a larger model, the text is too
            short, or a window is too long for memory.
    """
    tokenizer, vocab_size = tokenizer_of(loaded), loaded.decoder.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}"
        )
    context = first_given(context, loaded.context, CONTEXT)
    if context * vocab_size > _MOST_LOGITS_OF_A_WINDOW:
        raise ValueError(
            f"a context of {context} tokens with a vocabulary of {vocab_size} takes more than "
            f"{_MOST_LOGITS_OF_A_WINDOW} logits for each window; give a smaller one"
        )
    return held_out(
        tokenizer,
        files,
        context=context,
        split=split,
        val_fraction=first_given(val_fraction, loaded.val_fraction, VAL_FRACTION),
        test_fraction=first_given(test_fraction, loaded.test_fraction, TEST_FRACTION),
        max_tokens=max_tokens,
        batch_tokens=first_given(batch_tokens, min(_BATCH_TOKENS, tokens_at_once(loaded.decoder))),
    )


def first_given(*values: Given | None) -> Given:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def usable_device(name: str | None) -> torch.device:
    """The device of a name, by default a CUDA GPU if there is one.

    Raises:
        ValueError: if there is no such device here.
    """
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
