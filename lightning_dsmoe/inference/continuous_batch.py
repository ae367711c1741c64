"""Continuing texts that come and go, as a server does.

Shapes: B sequences in a batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.decode.step_sizes import SIZES
from lightning_dsmoe.inference.engine.engine import EngineReader
from lightning_dsmoe.inference.generation import as_tokens, left_pad
from lightning_dsmoe.inference.sampling import Sampler
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.inference.text import Stop, TextStream

MOST_TEXTS = SIZES[-1]
"""Texts that a batch continues at a time."""


class Continuation:
    """A text that is continued in a batch, with options of its own.

    Args:
        model: the model, which has a tokenizer.
        prompt: the text.
        max_new_tokens: most tokens to add, which with the prompt have to fit into the context.
        stop: a text that ends it, or several.
        seed: seed of its samples.
        sampling: options of `Sampler`, such as `temperature` and `top_p`.

    Raises:
        ValueError: if the prompt is empty or too long, an option is out of range, or the model has
            no tokenizer.
    """

    finish_reason: Literal["stop", "length"] | None = None
    """Why it has ended: a stop text or a token of `Tokenizer.ends`, or its length; else None."""

    def __init__(
        self,
        model: SparseModel,
        prompt: str,
        max_new_tokens: int,
        *,
        stop: Stop | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> None:
        if model.tokenizer is None:
            raise ValueError("this model was saved without a tokenizer, so it continues no text")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        self.text = TextStream(model.tokenizer, prompt, stop)
        self.n_prompt_tokens, self.n_left = len(self.text.tokens), max_new_tokens
        most = model.context_length
        if most is not None and self.n_prompt_tokens + max_new_tokens > most:
            raise ValueError(
                f"the prompt has {self.n_prompt_tokens} tokens, which with {max_new_tokens} new "
                f"ones do not fit the context of {most}"
            )
        generator = torch.Generator(model.decoder.embedding.weight.device)
        self._sampler = Sampler(**sampling, generator=generator.manual_seed(seed))

    @property
    def n_new_tokens(self) -> int:
        """Tokens added so far."""
        return len(self.text.tokens) - self.n_prompt_tokens

    def take(self, logits_1V: Tensor) -> int:
        """Add the next token, from its logits, and return it."""
        token = int(self._sampler(logits_1V))
        self.text.add(token)
        self.n_left -= 1
        if self.text.ended:
            self.finish_reason = "stop"
        elif self.n_left == 0:
            self.finish_reason = "length"
        return token


class ContinuousBatch:
    """Continues up to 16 texts together; one may join or leave at any token.

    Each is what it would be alone, up to the rounding of sums, but for selections that count over
    all tokens of a step (`ThresholdTopK`).

    Args:
        model: the model, whose plan runs.

    Examples:
        >>> model = load_sparse("sparse_model")  # doctest: +SKIP
        >>> batch = ContinuousBatch(model)  # doctest: +SKIP
        >>> first = Continuation(model, "def ", 20, temperature=0)  # doctest: +SKIP
        >>> batch.add([first])  # doctest: +SKIP
        >>> batch.step()  # doctest: +SKIP
        >>> first.text.added  # doctest: +SKIP
        'm'
    """

    def __init__(self, model: SparseModel) -> None:
        self._model = model
        self.running: list[Continuation] = []
        self._reader: EngineReader | None = None
        self._logits_BV = torch.empty(0)

    @property
    def n_free(self) -> int:
        """How many texts can be added."""
        return MOST_TEXTS - len(self.running)

    def warm_up(self) -> None:
        """Compile now what decoding any number of texts needs, and wait for it."""
        self._model.engine.warm_up(self._model.plan, *range(1, MOST_TEXTS + 1))

    @torch.inference_mode()
    def add(self, new: Sequence[Continuation]) -> None:
        """Read the prompts of new texts.

        Raises:
            ValueError: if they are more than `n_free`, or none.
        """
        if not 0 < len(new) <= self.n_free:
            raise ValueError(f"{self.n_free} texts can be added, got {len(new)}")
        engine = self._model.engine
        prompts, mask = left_pad([each.text.tokens for each in new])
        prompts_BT = as_tokens(engine, prompts)
        reader = engine.open(len(new), prompts_BT.shape[1], self._model.plan)
        padding = None if bool(mask.all()) else mask.to(prompts_BT.device)
        logits_BV = reader.read(prompts_BT, padding)
        both = [reader] if self._reader is None else [self._reader, reader]
        running = [*self.running, *new]
        if self.running:
            logits_BV = torch.cat([self._logits_BV, logits_BV])
        self._reader = engine.join(both, max(each.n_left for each in running))
        self.running, self._logits_BV = running, logits_BV

    @torch.inference_mode()
    def step(self) -> None:
        """Add a token to each text; those that have ended leave. Without texts it does nothing."""
        if not self.running:
            return
        tokens = [
            each.take(logits_1V)
            for each, logits_1V in zip(self.running, self._logits_BV.split(1), strict=True)
        ]
        rows = [row for row, each in enumerate(self.running) if each.finish_reason is None]
        self.keep(rows)
        if self._reader is not None:
            new_B1 = torch.tensor([[tokens[row]] for row in rows], device=self._logits_BV.device)
            self._logits_BV = self._reader.read(new_B1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the running texts only, by their numbers."""
        if list(rows) == list(range(len(self.running))):
            return
        self.running = [self.running[row] for row in rows]
        self._logits_BV = self._logits_BV[list(rows)]
        if not rows:
            self._reader = None
        elif self._reader is not None:
            self._reader.keep(rows)
