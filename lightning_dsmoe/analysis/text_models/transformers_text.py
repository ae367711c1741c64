"""A causal model of transformers, as text is scored and continued with it.

Shapes: B sequences in a batch, T positions, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.analysis.measured import evaluating
from lightning_dsmoe.analysis.text_models.text_model import (
    DEFAULT_CONTEXT,
    Continuing,
    Read,
    TextModel,
)
from lightning_dsmoe.inference.generation import left_pad
from lightning_dsmoe.metrics import count_parameters
from lightning_dsmoe.routing import SelectionPlan, record_routings, routed_layers, run_plan
from lightning_dsmoe.tokenizers import tokens_before


class TransformersText(TextModel):
    """A causal model of transformers with its tokenizer; an upcycled one runs any plan.

    Args:
        model: such as `AutoModelForCausalLM.from_pretrained` gives.
        tokenizer: such as `AutoTokenizer.from_pretrained` gives.
        prefix_token: the token before a text; None takes the beginning of a text, or else its end.

    Raises:
        ValueError: if the tokenizer has more tokens than the model, or the model no positions.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, prefix_token: int | None = None
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.routed = bool(routed_layers(model))
        config = cast(Any, model).config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        if (largest := max(tokenizer.get_vocab().values())) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer has {largest + 1} tokens, the model only {self.vocab_size}"
            )
        # Experts of transformers' own classes are out of sight: what runs of them is not known.
        self.counts = count_parameters(model) if self.routed else None
        self.context_length = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
        if self.context_length < 1:
            raise ValueError(f"max_position_embeddings is {self.context_length}, not 1 or more")
        marked, plain = tokenizer.encode("a"), self.encode("a")
        self.beginning = tokens_before(marked, plain)
        known = (prefix_token, tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        self.prefix_token = next(token for token in known if token is not None)
        # After the end of a sequence in a batch; a special token, so that it is no text.
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, self.prefix_token)
        self._padding: int = next(token for token in ends if token is not None)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def read(self, tokens_BT: Tensor, plan: SelectionPlan) -> Read:
        # Right of a token is nothing that it attends to, so padding there needs no mask.
        with self._running(plan), evaluating(self.model), torch.no_grad():
            if not self.routed:
                return Read(self.model(input_ids=tokens_BT, use_cache=False).logits, {})
            with record_routings(self.model) as record:
                logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits
        masks = record.active_masks()  # some models flatten B and T before their routed layers
        return Read(logits_BTV, {n: m.view(*tokens_BT.shape, -1) for n, m in masks.items()})

    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SelectionPlan, how: Continuing
    ) -> list[str]:
        tokens_BT, mask_BT = left_pad([list(tokens) for tokens in prompts], pad=self._padding)
        n_prompt = tokens_BT.shape[1]

        def stopped(tokens_BT: Tensor, scores: Any, **options: Any) -> Tensor:
            new = tokens_BT[:, n_prompt:].tolist()
            ended = [how.ended(self.decode(tokens)) for tokens in new]
            return torch.tensor(ended, device=tokens_BT.device)

        sampling: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if how.temperature:
            sampling |= {"do_sample": True, "temperature": how.temperature}
        with self._running(plan), evaluating(self.model), torch.no_grad():
            tokens_BT = self.model.generate(
                input_ids=tokens_BT.to(self.device),
                attention_mask=mask_BT.to(self.device).long(),
                max_new_tokens=how.max_new_tokens,
                stopping_criteria=[stopped],
                pad_token_id=self._padding,
                **sampling,
            )
        return [how.cut(self.decode(tokens)) for tokens in tokens_BT[:, n_prompt:].tolist()]

    @contextmanager
    def _running(self, plan: SelectionPlan) -> Iterator[None]:
        if self.routed:
            with run_plan(self.model, plan):
                yield
        elif plan == SelectionPlan():
            yield
        else:
            raise ValueError(
                f"a plan needs routed layers, and this {type(self.model).__name__} has none that "
                "this library knows: upcycle a dense model, or import a mixture of experts"
            )
