"""The sparse model of a decoder, as text is scored and continued with it.

Shapes: B sequences in a batch, T positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dsmoe.analysis.text_models.text_model import (
    DEFAULT_CONTEXT,
    Continuing,
    Read,
    TextModel,
)
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.inference.generation import left_pad, new_tokens
from lightning_dsmoe.metrics import active_masks, count_parameters
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.architecture import build_decoder
from lightning_dsmoe.tokenizers import Tokenizer


class DecoderText(TextModel):
    """A `SparseModel` with a tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer; None takes the one in the model.
        prefix_token: the token before a text; None takes the one with which the tokenizer begins a
            text, or else that of a line break, or else 0.

    Raises:
        ValueError: if there is no tokenizer, or it has more tokens than the model.
    """

    def __init__(
        self,
        model: SparseModel,
        tokenizer: Tokenizer | None = None,
        *,
        prefix_token: int | None = None,
    ) -> None:
        found = model.tokenizer if tokenizer is None else tokenizer
        if found is None:
            raise ValueError("this model was saved without a tokenizer, so it cannot read text")
        self.model = model
        self.tokenizer = found
        self.vocab_size = model.decoder.vocab_size
        if found.vocab_size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {found.vocab_size} tokens, the model only {self.vocab_size}"
            )
        self.counts = count_parameters(build_decoder(model.architecture))
        self.context_length = model.context_length or DEFAULT_CONTEXT
        self.beginning = found.beginning
        known = (self.beginning or [_line_break(found)])[-1]
        self.prefix_token = known if prefix_token is None else prefix_token

    @property
    def device(self) -> torch.device:
        return self.model.decoder.embedding.weight.device

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def read(self, tokens_BT: Tensor, plan: SelectionPlan) -> Read:
        logits_BTV, routings = self.model(tokens_BT, plan)
        return Read(logits_BTV, active_masks(routings, plan, self.model.decoder))

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SelectionPlan, how: Continuing
    ) -> list[str]:
        # As tokens: a prompt whose beginning was left out need not be whole characters.
        tokens_BT, mask_BT = left_pad([list(tokens) for tokens in prompts])
        self.model.warm_up(len(prompts), plan)  # or texts would depend on when kernels are ready
        continued: list[list[int]] = [[] for _ in prompts]
        for new_B in new_tokens(
            self.model.engine,
            tokens_BT.to(self.device),
            how.max_new_tokens,
            plan=plan,
            mask=None if bool(mask_BT.all()) else mask_BT.to(self.device),
            context_length=self.context_length,
            temperature=how.temperature,
        ):
            for tokens, token in zip(continued, new_B.tolist(), strict=True):
                tokens.append(token)
            if how.stop and all(how.ended(self.decode(tokens)) for tokens in continued):
                break
        return [how.cut(self.decode(tokens)) for tokens in continued]


def _line_break(tokenizer: Tokenizer) -> int:
    try:
        tokens = tokenizer.encode("\n")
    except ValueError:  # not in the alphabet
        return 0
    return int(tokens[-1]) if len(tokens) else 0
