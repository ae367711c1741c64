"""Texts that come and go."""

import string
from typing import Any

import pytest

from lightning_dsmoe.inference import SparseModel, compile_sparse
from lightning_dsmoe.inference.continuous_batch import Continuation, ContinuousBatch
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK
from lightning_dsmoe.tokenizers import CharTokenizer

from .conftest import UNCOMPILED, rotary_glu

LETTERS = CharTokenizer(string.ascii_lowercase + " .\n")


def made(**options: Any) -> SparseModel:
    plan = SelectionPlan(Threshold(0.9), TopK(1))
    return compile_sparse(rotary_glu(), plan, switch_points=UNCOMPILED, **options)


def test_each_text_is_what_it_is_alone() -> None:
    model = made(tokenizer=LETTERS)
    prompts = ["a", "in the end ", "two. ", "the quick brown fox", "\n"]
    options: list[dict[str, Any]] = [{"temperature": n % 2 * 2.0, "seed": n} for n in range(20)]
    lengths = [3 + 5 * n % 13 for n in range(20)]
    waiting = [Continuation(model, prompts[n % 5], lengths[n], **options[n]) for n in range(20)]
    everything, batch, steps = list(waiting), ContinuousBatch(model), 0
    while waiting or batch.running:
        new = [waiting.pop(0) for _ in range(min(len(waiting), batch.n_free, 1 + steps % 3))]
        if new:
            batch.add(new)
        batch.step()
        steps += 1
    assert steps < sum(lengths) / 2
    for n, each in enumerate(everything):
        alone = ContinuousBatch(model)
        alone.add([again := Continuation(model, prompts[n % 5], lengths[n], **options[n])])
        while alone.running:
            alone.step()
        assert each.text.text == again.text.text
        assert (each.finish_reason, each.n_new_tokens) == ("length", lengths[n])
        if not options[n]["temperature"]:
            assert each.text.text == model.generate(prompts[n % 5], lengths[n], temperature=0)


def test_a_stop_text_ends_one_and_one_can_be_taken_out() -> None:
    model = made(tokenizer=LETTERS)
    whole = model.generate("a", 12, temperature=0)
    first, second, third = (
        Continuation(model, "a", 12, temperature=0, stop=stop) for stop in (whole[3], None, None)
    )
    batch = ContinuousBatch(model)
    batch.add([first, second, third])
    batch.keep([0, 1])
    while batch.running:
        batch.step()
    assert first.finish_reason == "stop"
    assert first.text.text == whole[: whole.index(whole[3], 1) + 1]
    assert second.text.text == whole
    assert third.n_new_tokens == 0


def test_a_token_that_ends_a_text_adds_nothing_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tokenizer=LETTERS)
    whole = model.generate("a", 12, temperature=0)
    end = whole[4]
    monkeypatch.setattr(CharTokenizer, "ends", property(lambda _: LETTERS.encode(end).tolist()))
    text, batch = Continuation(model, "a", 12, temperature=0), ContinuousBatch(model)
    batch.add([text])
    while batch.running:
        batch.step()
    assert text.text.added == whole[1 : whole.index(end, 1)]
    assert (text.finish_reason, text.n_new_tokens) == ("stop", len(text.text.added) + 1)


def test_texts_keep_the_order_that_is_given() -> None:
    model = made(tokenizer=LETTERS)
    texts = [Continuation(model, prompt, 9, temperature=0) for prompt in ("a", "the end")]
    batch = ContinuousBatch(model)
    batch.add(texts)
    batch.step()
    batch.keep([1, 0])
    assert batch.running == texts[::-1]
    while batch.running:
        batch.step()
    for prompt, text in zip(("a", "the end"), texts, strict=True):
        assert text.text.text == model.generate(prompt, 9, temperature=0)


@pytest.mark.parametrize(
    ("prompt", "most", "options", "message"),
    [
        ("", 3, {}, "a prompt must have a token or more"),
        (
            "abc",
            6,
            {},
            "the prompt has 3 tokens, which with 6 new ones do not fit the context of 8",
        ),
        ("a", 0, {}, "max_new_tokens must be 1 or more, got 0"),
        ("a", 1, {"top_p": 0}, "top_p must be above 0"),
        ("a", 1, {"stop": [1]}, "stop must be one text or several"),
    ],
)
def test_options_are_checked(prompt: str, most: int, options: dict[str, Any], message: str) -> None:
    model = made(tokenizer=LETTERS, context_length=8)
    with pytest.raises(ValueError, match=message):
        Continuation(model, prompt, most, **options)
    with pytest.raises(ValueError, match="without a tokenizer"):
        Continuation(made(), "a", 1)
