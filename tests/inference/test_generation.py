"""Continuing prompts: caches, padding, forgetting, stopping and sampling."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.compilation import compile_sparse
from lightning_dsmoe.inference.generation import generate, left_pad
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK

from ..pairwise import pairwise
from .conftest import (
    SAMPLINGS,
    UNCOMPILED,
    learned_positions_mlp,
    rotary_glu,
    without_routers,
)

PLANS = [
    SelectionPlan(),
    SelectionPlan(experts=TopK(2), attention=TopK(1)),
    SelectionPlan(experts=Threshold(0.9), attention=Threshold(0.6)),
]


def greedy(decoder: Decoder, tokens: Tensor, new: int, **options: Any) -> Tensor:
    return generate(decoder, tokens, new, temperature=0, **options)


@torch.no_grad()
def greedy_by_hand(
    decoder: Decoder, tokens: Tensor, new: int, plan: SelectionPlan | None = None
) -> Tensor:
    for _ in range(new):
        chosen = decoder(tokens, plan).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    return tokens


@pytest.mark.parametrize("plan", PLANS, ids=["dense", "top k", "threshold"])
def test_the_same_greedy_tokens_as_without_caches(
    plan: SelectionPlan, decoder: Decoder, tokens: Tensor
) -> None:
    prompts = tokens[:, :5]
    continued = greedy(decoder, prompts, 9, plan=plan)
    assert torch.equal(continued, greedy_by_hand(decoder, prompts, 9, plan))
    assert len(continued[:, 5:].unique()) > 2


def test_without_a_plan_all_experts_run(decoder: Decoder, tokens: Tensor) -> None:
    dense = greedy(decoder, tokens[:, :5], 12)
    assert torch.equal(dense, greedy(decoder, tokens[:, :5], 12, plan=PLANS[0]))
    sparse = SelectionPlan(experts=TopK(1), attention=TopK(1))
    assert not torch.equal(dense, greedy(decoder, tokens[:, :5], 12, plan=sparse))


@pytest.mark.parametrize(
    ("make_decoder", "plan", "row"),
    pairwise(make_decoder=[rotary_glu, learned_positions_mlp], plan=PLANS, row=[0, 7]),
    indirect=["make_decoder"],
)
def test_a_prompt_continues_in_a_batch_as_it_does_alone(
    row: int, plan: SelectionPlan, decoder: Decoder, tokens: Tensor
) -> None:
    sequences = [tokens.flatten()[n : n + 2 + n].tolist() for n in range(8)]
    sequences[row] = tokens[2, :4].tolist()
    prompts, mask = left_pad(sequences, pad=3)
    together = greedy(decoder, prompts, 8, plan=plan, mask=mask)
    alone = greedy(decoder, tokens[2:, :4], 8, plan=plan)
    assert torch.equal(together[row, -12:], alone[0])


@pytest.mark.parametrize("context", [4, 7, 8])
def test_a_full_context_forgets_its_older_half(
    context: int, decoder: Decoder, tokens: Tensor
) -> None:
    continued = greedy(decoder, tokens[:, :4], 15, context_length=context)
    seen = tokens[:, :4]
    with torch.no_grad():
        for at in range(4, 19):
            if seen.shape[1] > context:
                seen = seen[:, -(context // 2) :]
            chosen = decoder(seen).logits[:, -1].argmax(-1, keepdim=True)
            assert torch.equal(chosen[:, 0], continued[:, at])
            seen = torch.cat([seen, chosen], 1)


def test_padding_fills_the_context_too_and_is_then_forgotten(
    decoder: Decoder, tokens: Tensor
) -> None:
    prompts, mask = left_pad([tokens[0, :1].tolist(), tokens[1, :6].tolist()])
    continued = greedy(decoder, prompts, 10, mask=mask, context_length=6)
    assert torch.equal(continued[1], greedy(decoder, tokens[1:2, :6], 10, context_length=6)[0])
    with torch.no_grad():
        first = decoder(tokens[:1, :1]).logits[:, -1].argmax(-1)
        assert continued[0, 6] == first
        second = decoder(torch.stack([tokens[0, :1], first], 1)).logits[:, -1].argmax(-1)
        assert continued[0, 7] == second
        later = decoder(continued[:1, 8:11]).logits[:, -1].argmax(-1)  # forgotten once more
        assert continued[0, 11] == later


def test_learned_positions_are_the_context_unless_told(tokens: Tensor) -> None:
    decoder = learned_positions_mlp(max_positions=9)
    continued = greedy(decoder, tokens[:, :9], 12)
    assert continued.shape == (3, 21)
    assert torch.equal(continued, greedy(decoder, tokens[:, :9], 12, context_length=9))
    assert not torch.equal(continued[:1], greedy(decoder, tokens[:1, :8], 13, context_length=8))
    with pytest.raises(ValueError, match="a context of 10, but the model has 9 positions"):
        greedy(decoder, tokens[:, :9], 1, context_length=10)


@torch.no_grad()
def test_a_context_of_one_token(one_decoder: Decoder, tokens: Tensor) -> None:
    continued = greedy(one_decoder, tokens[:, :1], 5, context_length=1)
    for at in range(5):
        logits = one_decoder(continued[:, at : at + 1]).logits[:, 0]
        assert torch.equal(logits.argmax(-1), continued[:, at + 1])


def test_prompts_of_any_form(one_decoder: Decoder, tokens: Tensor) -> None:
    expected = greedy(one_decoder, tokens, 3)
    forms: list[Any] = [tokens.tolist(), tokens.numpy(), tokens.to(torch.uint8), tokens.int()]
    for form in [*forms, tokens.numpy().astype("uint16")]:
        assert torch.equal(greedy(one_decoder, form, 3), expected)
        assert torch.equal(greedy(one_decoder, form[0], 3), expected[0])
    mask = torch.arange(16) > 4
    padded = greedy(one_decoder, tokens[0], 3, mask=mask)
    assert torch.equal(padded[-3:], greedy(one_decoder, tokens[0, 5:], 3)[-3:])
    assert torch.equal(padded, greedy(one_decoder, tokens[:1], 3, mask=[mask.tolist()])[0])


def test_nothing_new(decoder: Decoder, tokens: Tensor) -> None:
    assert torch.equal(generate(decoder, tokens, 0), tokens)


def test_a_model_without_routers(tokens: Tensor) -> None:
    decoder = without_routers()
    assert torch.equal(greedy(decoder, tokens, 4), greedy_by_hand(decoder, tokens, 4))


def test_a_sequence_that_ended_repeats_its_stop_token(decoder: Decoder, tokens: Tensor) -> None:
    free = greedy(decoder, tokens[:, :5], 12)
    stop = int(free[0, 8])
    columns: list[Tensor] = []
    stopped = greedy(decoder, tokens[:, :5], 12, stop=[stop, 28], on_tokens=columns.append)
    assert torch.equal(torch.stack(columns, 1), stopped[:, 5:])
    ends = []
    for row in range(3):
        at = next((n for n in range(5, 17) if int(free[row, n]) in (stop, 28)), 16)
        ends.append(at)
        assert torch.equal(stopped[row, : at + 1], free[row, : at + 1])
        assert (stopped[row, at:] == free[row, at]).all()
    assert stopped.shape[1] == max(ends) + 1
    assert min(ends) < 16


def test_all_sequences_ended_is_the_end(one_decoder: Decoder, tokens: Tensor) -> None:
    everything = generate(one_decoder, tokens, 50, stop=range(29))
    assert everything.shape == (3, 17)
    prompt = generate(one_decoder, tokens[:1, :4], 3, stop=tokens[0, :4].tolist(), temperature=0)
    assert torch.equal(prompt[:, :4], tokens[:1, :4])
    assert prompt.shape[1] > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"a token or more, got \(1, 0\)"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.long)}, r"a token or more, got \(0, 3\)"),
        ({"tokens": torch.zeros(1, 1, 3, dtype=torch.long)}, r"a token or more, got \(1, 1, 3\)"),
        ({"tokens": []}, r"a token or more, got \(0,\)"),
        ({"tokens": [[1], [2, 3]]}, r"of one length \(left_pad .*, got \[\[1\], \[2, 3\]\]"),
        ({"tokens": ["a", 3]}, r"must be whole numbers, .* got \['a', 3\]"),
        ({"tokens": torch.ones(1, 3)}, r"must be whole numbers, got torch\.float32"),
        ({"tokens": [True, False]}, r"must be whole numbers, got torch\.bool"),
        ({"tokens": torch.tensor([[3, 29]])}, "token 29 is not in 0 to 28"),
        ({"tokens": torch.tensor([[3, -1]])}, "token -1 is not in 0 to 28"),
        ({"stop": [29]}, "token 29 is not in 0 to 28"),
        ({"stop": "."}, "stop must be tokens for prompts of tokens, got '.'"),
        ({"context_length": 15}, "the prompt has 16 tokens, the context holds 15"),
        ({"context_length": 0}, "the prompt has 16 tokens, the context holds 0"),
        ({"mask": torch.ones(3, 15)}, r"a mask of \(3, 15\) for prompts of \(3, 16\)"),
        (
            {"mask": torch.zeros(3, 16, dtype=torch.bool)},
            "a prompt is empty, or its padding is not on the left",
        ),
        ({"mask": torch.arange(16).expand(3, 16) != 5}, "its padding is not on the left"),
        ({"mask": torch.arange(16).expand(3, 16) < 9}, "its padding is not on the left"),
        ({"max_new_tokens": -1}, "must be a whole number from 0, got -1"),
        ({"temperature": -0.5}, r"temperature must be 0 or from 1e-06 to 1e\+06, got -0\.5"),
        ({"temperature": float("nan")}, r"temperature must be 0 or from .*, got nan"),
        ({"temperature": float("inf")}, r"temperature must be 0 or from .*, got inf"),
        ({"temperature": 1e-46}, r"temperature must be 0 or from .*, got 1e-46"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be above 0 and at most 1, got 1\.5"),
        ({"plan": SelectionPlan(layers={"blocks.2": TopK(1)})}, "no routed layer 'blocks.2'"),
        ({"plan": SelectionPlan(experts=TopK(5))}, r"TopK\(k=5\) needs k <= 4"),
    ],
)
def test_impossible_options(
    options: dict[str, Any], message: str, one_decoder: Decoder, tokens: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(one_decoder, **{"tokens": tokens, "max_new_tokens": 2, **options})


def test_an_empty_prompt_in_a_batch(one_decoder: Decoder) -> None:
    prompts, mask = left_pad([[1, 2], []])
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(one_decoder, prompts, 2, mask=mask)
    assert [tensor.shape for tensor in left_pad([])] == [(0, 0), (0, 0)]


def test_left_padding() -> None:
    tokens, mask = left_pad([[5], [1, 2, 3], [4, 6]], pad=9)
    assert tokens.tolist() == [[9, 9, 5], [1, 2, 3], [9, 4, 6]]
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]


def test_a_seed_repeats_and_generators_share_nothing(one_decoder: Decoder, tokens: Tensor) -> None:
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def continued(generator: torch.Generator | None) -> Tensor:
        return generate(one_decoder, tokens, 6, temperature=3.0, generator=generator)

    first, other = continued(seeded(1)), continued(seeded(2))
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    a, b = seeded(1), seeded(2)
    one, two = tokens, tokens
    for _ in range(6):  # in turns, each as if it were alone
        one = generate(one_decoder, one, 1, temperature=3.0, generator=a)
        two = generate(one_decoder, two, 1, temperature=3.0, generator=b)
    assert torch.equal(one, first)
    assert torch.equal(two, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(continued(None), first)


def test_options_of_sampling_reach_the_samples(one_decoder: Decoder, tokens: Tensor) -> None:
    expected = greedy(one_decoder, tokens, 8)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        options = {"temperature": 5.0, **narrow}
        assert torch.equal(generate(one_decoder, tokens, 8, **options), expected)
    assert not torch.equal(generate(one_decoder, tokens, 8, temperature=5.0), expected)


def test_generating_leaves_the_model_trainable(one_decoder: Decoder, tokens: Tensor) -> None:
    before = copy.deepcopy(one_decoder.state_dict())
    assert generate(one_decoder, tokens, 2).is_inference()
    one_decoder(tokens).logits.sum().backward()
    assert one_decoder.embedding.weight.grad is not None
    for name, tensor in one_decoder.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_the_engine_says_that_logits_are_not_finite(
    options: dict[str, Any], one_decoder: Decoder, tokens: Tensor
) -> None:
    model = compile_sparse(one_decoder, PLANS[1], switch_points=UNCOMPILED)
    columns: list[Tensor] = []
    for weight in (one_decoder.embedding.weight, model.decoder.embedding.weight):
        with torch.no_grad():
            weight[28] = torch.nan
    for write in (partial(generate, one_decoder), model.generate):
        with pytest.raises(FloatingPointError, match="the logits are not finite"):
            write(tokens, 3, on_tokens=columns.append, **options)
    assert not columns
