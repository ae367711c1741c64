"""Continuing prompts with a model that is in training, or was loaded from a checkpoint of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.text import Prompts, continue_prompts
from lightning_dsmoe.tokenizers import Tokenizer


def continue_with(
    pl_module: LightningModule,
    decoder: Decoder,
    loaded: dict[str, Any],
    prompts: Prompts,
    max_new_tokens: int,
    options: dict[str, Any],
) -> str | list[str] | Tensor:
    """Continue prompts, with the tokenizer and the context of the data or of the checkpoint.

    Args:
        pl_module: the model; the data module is that of its Trainer.
        decoder: its decoder.
        loaded: `tokenizer` and `context` of the checkpoint that it was loaded from, if from any.
        prompts: text, texts or tokens.
        max_new_tokens: most tokens to add.
        options: those of `generate`.
    """
    data = getattr(pl_module._trainer, "datamodule", None)

    def tokenizer() -> Tokenizer | None:
        found = getattr(data, "tokenizer", None)
        if found is None and loaded.get("tokenizer") is not None:
            found = Tokenizer.from_dict(loaded["tokenizer"])
        return found

    context = getattr(data, "context", loaded.get("context"))
    options = {"context_length": context, **options}
    with _evaluating(decoder):
        return continue_prompts(decoder, tokenizer, prompts, max_new_tokens, options)


@contextmanager
def _evaluating(decoder: Decoder) -> Iterator[None]:
    modes = {module: module.training for module in decoder.modules()}
    decoder.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
