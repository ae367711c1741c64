"""In batches, sequences get what they would get alone; what ran for them is counted."""

import math
from typing import Any

import pytest
import torch

from lightning_dsmoe import AllExperts, SelectionPlan, ThresholdTopK, TopK
from lightning_dsmoe.analysis.text_models import (
    Continuing,
    DecoderText,
    Scorer,
    TextModel,
    TransformersText,
    Window,
    text_loss,
)
from lightning_dsmoe.analysis.text_models.windows import rolling_windows
from lightning_dsmoe.metrics import active_parameters
from tests.text_models import CONTEXT, llama

PLAN = SelectionPlan(experts=TopK(2), layers={})
TEXTS = ["to be", "or not to be, that is", "?", "the question is", "whether"]


@pytest.fixture(params=["decoder", "llama"])
def model(request: pytest.FixtureRequest) -> TextModel:
    found: TextModel = request.getfixturevalue(f"{request.param}_text")
    return found


def windows(model: TextModel) -> list[Window]:
    context = model.encode("Hamlet: ")
    return [Window.of(context, model.encode(text), model.context_length) for text in TEXTS]


def logits_of(model: TextModel, tokens: list[int], plan: SelectionPlan) -> torch.Tensor:
    """By the models themselves, one sequence at a time."""
    from lightning_dsmoe import run_plan

    if isinstance(model, DecoderText):
        return model.model.logits(torch.tensor([tokens]), plan)[0]
    assert isinstance(model, TransformersText)
    with torch.no_grad(), run_plan(model.model, plan):
        logits: torch.Tensor = model.model(input_ids=torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("plan", [SelectionPlan(), PLAN], ids=["all", "plan"])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_scores(model: TextModel, plan: SelectionPlan, batch_size: int | None) -> None:
    found = Scorer(model, plan, batch_size=batch_size).scores(windows(model))
    for window, score in zip(windows(model), found, strict=True):
        logits = logits_of(model, window.inputs, plan)[-len(window.targets) :]
        logprobs = logits.double().log_softmax(-1)
        expected = sum(float(row[t]) for row, t in zip(logprobs, window.targets, strict=True))
        assert score.logprob == pytest.approx(expected, rel=1e-5)
        assert score.is_greedy == (logits.argmax(-1).tolist() == window.targets)


def test_the_most_probable_tokens_are_greedy(model: TextModel) -> None:
    inputs = model.encode("to be or")
    best = logits_of(model, inputs, PLAN).argmax(-1).tolist()
    other = [*best[:-1], (best[-1] + 1) % 256]
    scorer = Scorer(model, PLAN)
    [first, second] = scorer.scores([Window(inputs, best), Window(inputs, other)])
    assert (first.is_greedy, second.is_greedy) == (True, False)


def test_the_share_is_that_of_the_tokens_read(model: TextModel) -> None:
    plan = SelectionPlan(experts=ThresholdTopK(1.0), attention=AllExperts())
    for each in (PLAN, plan):
        scorer = Scorer(model, each)
        scorer.scores(windows(model))
        shares, n_tokens = 0.0, 0
        for window in windows(model):
            _, active = model.read(torch.tensor([window.inputs]), each)
            share = active_parameters(model.counts, active)
            shares += float(share.mean) * len(window.inputs)
            n_tokens += len(window.inputs)
        assert float(scorer.active_share.mean) == pytest.approx(shares / n_tokens)
        assert 0.3 < float(scorer.active_share.mean) < 1


def test_nothing_read_has_no_share(model: TextModel) -> None:
    scorer = Scorer(model)
    assert scorer.scores([]) == []
    assert scorer.active_share is None


def test_models_without_routed_layers_run_no_plan() -> None:
    plain = llama(routed=False)
    scorer = Scorer(plain)
    assert len(scorer.scores(windows(plain))) == len(TEXTS)
    assert scorer.active_share is None
    with pytest.raises(ValueError, match="a plan needs routed layers, and this LlamaForCausalLM"):
        Scorer(plain, PLAN).scores(windows(plain))


@pytest.mark.parametrize("plan", [SelectionPlan(), PLAN], ids=["all", "plan"])
def test_continuations(model: TextModel, plan: SelectionPlan) -> None:
    prompts = [model.encode(text[:12]) for text in TEXTS]
    how = Continuing(10)
    found = Scorer(model, plan).continuations(prompts, how)
    alone = [Scorer(model, plan).continuations([prompt], how)[0] for prompt in prompts]
    assert found == alone
    for prompt, text in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in range(3):
            tokens.append(int(logits_of(model, tokens, plan)[-1].argmax()))
        greedy = model.decode(tokens[len(prompt) :])
        assert text.startswith(greedy.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_stop_text_ends_a_continuation(model: TextModel) -> None:
    prompt = model.encode("to be")
    [whole] = Scorer(model).continuations([prompt], Continuing(12))
    stop = whole[2:4]
    [text] = Scorer(model).continuations([prompt], Continuing(12, stop=(stop, "never")))
    assert text == whole[: whole.index(stop)]


def test_long_and_empty_prompts(model: TextModel) -> None:
    long = model.encode("to be or not to be, that is the question " * 3)
    how = Continuing(4)
    [cut, short, empty] = Scorer(model).continuations([long, long[-20:], []], how)
    assert cut == short
    [prefixed] = Scorer(model).continuations([[model.prefix_token]], how)
    assert empty == prefixed


def test_a_prompt_keeps_half_of_the_context(model: TextModel) -> None:
    prompt = model.encode("to be or not to be, that is the question")
    [long] = Scorer(model).continuations([prompt], Continuing(100))
    [half] = Scorer(model).continuations([prompt[-CONTEXT // 2 :]], Continuing(CONTEXT // 2))
    assert long == half


def test_prompts_that_begin_within_a_character(decoder_text: DecoderText) -> None:
    tokens = decoder_text.encode("€" * 9)[1:]
    for n in (CONTEXT - 4, CONTEXT - 5):
        [text] = Scorer(decoder_text).continuations([tokens[-n:]], Continuing(4))
        expected = decoder_text.model.generate(tokens[-n:], 4, temperature=0).tolist()
        assert text == decoder_text.decode(expected[n:])


def test_padding_after_the_end_is_no_text() -> None:
    model = llama()
    model = TransformersText(model.model, model.tokenizer, prefix_token=ord("a"))
    prompts = [model.encode(text) for text in ("to be", "or not", "question")]
    [first, *_] = (Scorer(model).continuations([prompt], Continuing(8)) for prompt in prompts)
    # What is most probable after the first prompt now ends a text.
    [end] = logits_of(model, prompts[0], SelectionPlan())[-1:].argmax(-1).tolist()
    model.model.generation_config.eos_token_id = end
    found = Scorer(model).continuations(prompts, Continuing(8))
    assert first[0].startswith(found[0])
    assert "a" not in found[0][1:]


def test_a_context_of_ones_own(model: TextModel) -> None:
    text = "To be, or not to be: that is the question, whether"
    scorer = Scorer(model, PLAN)
    nats = 0.0
    tokens = model.encode(text)
    for window in rolling_windows(tokens, model.prefix_token, 7):
        assert len(window.inputs) <= 7
        rows = logits_of(model, window.inputs, PLAN).double().log_softmax(-1)
        rows = rows[-len(window.targets) :]
        nats -= sum(float(row[t]) for row, t in zip(rows, window.targets, strict=True))
    assert text_loss(scorer, text, context=7).nats == pytest.approx(nats, rel=1e-5)
    for context in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"context must be from 1 to 24, got {context}"):
            text_loss(scorer, text, context=context)


def test_long_contexts_are_read_in_parts(decoder_text: DecoderText) -> None:
    decoder_text.context_length = 2**17  # rotary positions have no limit
    loss = text_loss(Scorer(decoder_text), "to be " * 400)
    assert loss == text_loss(Scorer(decoder_text), "to be " * 400, context=2048)
    assert loss.stderr is not None  # of windows


def test_bits_per_byte(model: TextModel) -> None:
    text = "To be, or not to be — that is the question: whether 'tis nobler" * 2
    scorer = Scorer(model, PLAN, batch_size=2)
    loss = text_loss(scorer, text)
    tokens = model.encode(text)
    nats = 0.0
    for start in range(0, len(tokens), model.context_length):
        # Each window is conditioned on all that fits, and the last one as well.
        scored = tokens[start : start + model.context_length]
        end = start + len(scored)
        inputs = [model.prefix_token, *tokens][max(0, end - model.context_length) : end]
        rows = logits_of(model, inputs, PLAN).double().log_softmax(-1)[-len(scored) :]
        nats -= sum(float(row[t]) for row, t in zip(rows, scored, strict=True))
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert (loss.n_tokens, loss.n_bytes) == (len(tokens), len(text.encode()))
    assert loss.bits_per_byte == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-5)
    assert 0 < loss.stderr < loss.nats
    with pytest.raises(ValueError, match="no token in the text"):
        text_loss(scorer, "")


@pytest.mark.parametrize("length", [1, 2, 5, 24])
@pytest.mark.parametrize("n_tokens", [0, 1, 4, 5, 6, 23])
def test_windows_score_every_token_once(n_tokens: int, length: int) -> None:
    tokens = list(range(1, n_tokens + 1))
    found = list(rolling_windows(tokens, 0, length))
    assert [token for window in found for token in window.targets] == tokens
    for window in found:
        whole = [*window.inputs, window.targets[-1]]
        assert whole == list(range(whole[0], whole[-1] + 1))
        assert len(window.targets) <= len(window.inputs) <= length
        assert len(window.inputs) == min(length, window.targets[-1])


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], list(range(9)))])
def test_windows_that_cannot_be(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(ValueError, match="each must have a token or more, and the continuation"):
        Window.of(context, continuation, 8)


def test_the_beginning_of_a_text() -> None:
    assert llama().beginning == []
    assert llama().prefix_token == 256
    marked = llama(beginning=True)
    assert (marked.beginning, marked.prefix_token) == ([257], 257)
    assert 257 not in marked.encode("a")


def test_invalid_options(decoder_text: DecoderText, llama_text: TransformersText) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Scorer(decoder_text, batch_size=0)
    tokenizer: Any = llama_text.tokenizer
    tokenizer.add_tokens(["one", "more"])
    llama_text.model.config.max_position_embeddings = -5
    with pytest.raises(ValueError, match="max_position_embeddings is -5, not 1 or more"):
        TransformersText(llama_text.model, llama().tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 260 tokens, the model only 258"):
        TransformersText(llama_text.model, tokenizer)
