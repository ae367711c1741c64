"""A text model for lm-evaluation-harness (package `lm_eval`)."""

from collections.abc import Sequence
from typing import Any

from lightning_dsmoe.analysis.text_models.scorer import Score, Scorer
from lightning_dsmoe.analysis.text_models.text_model import Continuing
from lightning_dsmoe.analysis.text_models.windows import Window, rolling_windows

NEEDS_HARNESS = "tasks need lm-evaluation-harness: pip install 'lightning-dsmoe[eval]'"
_NEW_TOKENS = 256
"""Most tokens of a continuation where a task does not say."""


def harness_model(scorer: Scorer) -> Any:
    """A model under a plan for `lm_eval.simple_evaluate(model=…)`.

    Args:
        scorer: the model and the plan; its `active_share` is known afterwards.

    Returns:
        An `lm_eval.api.model.LM`.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.

    Examples:
        >>> from lightning_dsmoe.analysis import DecoderText, Scorer, harness_model
        >>> scorer = Scorer(DecoderText(load_sparse("sparse_model")))  # doctest: +SKIP
        >>> results = simple_evaluate(harness_model(scorer), tasks=["arc_easy"])  # doctest: +SKIP
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError(NEEDS_HARNESS) from error
    model = scorer.model

    class HarnessModel(TemplateLM):  # type: ignore[misc]  # inside, since its base is optional
        """Hands the requests of tasks to a scorer."""

        @property
        def eot_token_id(self) -> int:
            return model.prefix_token

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            tokens, marks = model.encode(string), model.beginning
            if add_special_tokens is False or tokens[: len(marks)] == marks:
                return tokens
            return [*marks, *tokens]

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
        ) -> list[tuple[float, bool]]:
            # A continuation may be empty: one of a single token that is the prefix, or a blank.
            windows = {
                number: Window.of(
                    context or [model.prefix_token], continuation, model.context_length
                )
                for number, (_, context, continuation) in enumerate(requests)
                if continuation
            }
            scores = dict(zip(windows, scorer.scores(list(windows.values())), strict=True))
            return [scores.get(number, Score(0.0, True)) for number in range(len(requests))]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            windows = [
                list(
                    rolling_windows(
                        model.encode(request.args[0]), model.prefix_token, model.context_length
                    )
                )
                for request in requests
            ]
            scores = iter(scorer.scores([window for each in windows for window in each]))
            return [sum(next(scores).logprob for _ in each) for each in windows]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            by_how: dict[Continuing, list[int]] = {}
            for number, request in enumerate(requests):
                by_how.setdefault(_how(request.args[1]), []).append(number)
            found: dict[int, str] = {}
            for how, numbers in by_how.items():
                prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
                found |= zip(numbers, scorer.continuations(prompts, how), strict=True)
            return [found[number] for number in range(len(requests))]

    return HarnessModel()


def _how(options: dict[str, Any]) -> Continuing:
    """How a task wants its prompts continued; greedily unless it asks for samples."""
    until = options.get("until") or ()
    temperature = float(options.get("temperature") or 0)
    if options.get("do_sample") is False:
        temperature = 0.0
    return Continuing(
        int(options.get("max_gen_toks", _NEW_TOKENS)),
        (until,) if isinstance(until, str) else tuple(until),
        temperature,
    )
