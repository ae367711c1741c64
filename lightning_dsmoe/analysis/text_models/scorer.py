"""What a text model gives to texts under a plan, in batches, and the share of it that ran.

Shapes: B sequences in a batch, T positions, V vocabulary, N scored tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.analysis.text_models.text_model import Continuing, TextModel
from lightning_dsmoe.analysis.text_models.windows import Window
from lightning_dsmoe.metrics import ActiveShare, ActiveSums
from lightning_dsmoe.routing import SelectionPlan, ThresholdTopK

_MOST_LOGITS = 2**26  # of a batch, 256 MiB in float32
_MOST_CACHED = 2**14  # tokens of a batch that is continued
Item = TypeVar("Item")
Result = TypeVar("Result")


class Score(NamedTuple):
    """What a model gives to the targets of a window.

    Args:
        logprob: sum of ln p over the targets.
        is_greedy: whether each of them is the most probable token.
    """

    logprob: float
    is_greedy: bool


class Scorer:
    """A text model under a plan, which scores and continues texts in batches.

    A sequence gets what it would get alone, but for rounding. A `ThresholdTopK` averages over all
    tokens that are read at once, so under it sequences are read one by one.

    Args:
        model: the model.
        plan: the experts that run.
        batch_size: sequences in a batch; None takes as many as memory for their logits allows.
        on_progress: called with the number of sequences of each batch.

    Raises:
        ValueError: if the batch size is less than 1.
    """

    def __init__(
        self,
        model: TextModel,
        plan: SelectionPlan | None = None,
        *,
        batch_size: int | None = None,
        on_progress: Callable[[int], object] = lambda n: None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.plan = SelectionPlan() if plan is None else plan
        self.on_progress = on_progress
        selections = self.plan.experts, self.plan.attention, *self.plan.layers.values()
        alone = any(isinstance(each, ThresholdTopK) for each in selections)
        self.batch_size = 1 if alone else batch_size
        self._active = None if model.counts is None else ActiveSums(model.counts)

    def scores(self, windows: Sequence[Window]) -> list[Score]:
        """Score the targets of windows."""
        most = _MOST_LOGITS // self.model.vocab_size
        lengths = [len(window.inputs) for window in windows]
        return self._in_batches(windows, lengths, most, self._scores_of_batch)

    def continuations(self, prompts: Sequence[Sequence[int]], how: Continuing) -> list[str]:
        """Continue prompts, whose beginnings are left out if the context does not hold them all.

        A prompt keeps at least half of the context, however long the continuation may be: there are
        fewer new tokens then.

        Args:
            prompts: tokens of each prompt; an empty one becomes the prefix token.
            how: how to continue.
        """
        context_length = self.model.context_length
        room = max(1, context_length // 2, context_length - how.max_new_tokens)
        how = how._replace(max_new_tokens=min(how.max_new_tokens, max(1, context_length - room)))
        kept = [list(prompt[-room:]) or [self.model.prefix_token] for prompt in prompts]

        def continued(batch: Sequence[list[int]]) -> list[str]:
            texts = self.model.generate(batch, self.plan, how)
            # What ran while tokens came one by one is what runs when they are read once more.
            for tokens, text in zip(batch, texts, strict=True):
                self._read([[*tokens, *self.model.encode(text)][: self.model.context_length]])
            return texts

        lengths = [len(tokens) + how.max_new_tokens for tokens in kept]
        return self._in_batches(kept, lengths, _MOST_CACHED, continued)

    @property
    def active_share(self) -> ActiveShare | None:
        """Share of the hidden parameters that ran for a token, over all tokens read so far.

        None if the model's experts are not known, or nothing was read.
        """
        if self._active is None or not self._active.histogram.any():
            return None
        return self._active.share()

    def _scores_of_batch(self, windows: Sequence[Window]) -> list[Score]:
        logits_BTV = self._read([window.inputs for window in windows])
        found = []
        for logits_TV, window in zip(logits_BTV, windows, strict=True):
            end = len(window.inputs)
            logits_NV = logits_TV[end - len(window.targets) : end].float()
            targets_N = torch.tensor(window.targets, device=logits_NV.device)
            nats = F.cross_entropy(logits_NV, targets_N, reduction="sum")
            is_greedy = bool((logits_NV.argmax(-1) == targets_N).all())
            found.append(Score(-float(nats), is_greedy))
        return found

    def _read(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Logits of sequences padded on the right, and count what ran for them."""
        longest = max(map(len, sequences))
        rows = [[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences]
        tokens_BT = torch.tensor(rows, device=self.model.device)
        n_tokens_B1 = torch.tensor([[len(tokens)] for tokens in sequences], device=tokens_BT.device)
        mask_BT = torch.arange(longest, device=tokens_BT.device) < n_tokens_B1
        logits_BTV, active = self.model.read(tokens_BT, self.plan)
        if self._active is not None:
            self._active.add(active, mask_BT)
        return logits_BTV

    def _in_batches(
        self,
        items: Sequence[Item],
        lengths: Sequence[int],
        most_tokens: int,
        run: Callable[[Sequence[Item]], Sequence[Result]],
    ) -> list[Result]:
        """Run items of similar lengths together, the longest first: it shows whether all fit."""
        order = sorted(range(len(items)), key=lambda number: -lengths[number])
        results: dict[int, Result] = {}
        while order:
            n_items = self.batch_size or max(1, most_tokens // max(1, lengths[order[0]]))
            batch, order = order[:n_items], order[n_items:]
            results |= zip(batch, run([items[number] for number in batch]), strict=True)
            self.on_progress(len(batch))
        return [results[number] for number in range(len(items))]
