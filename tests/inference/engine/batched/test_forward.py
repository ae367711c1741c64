"""A packed decoder on many tokens, with both methods, against the plain decoder."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.decoder import Decoder, DecoderOutput, Routings
from lightning_dsmoe.experts import FeedForwardLayer
from lightning_dsmoe.inference import Remaining, prune
from lightning_dsmoe.inference.engine.batched import grouped_layers
from lightning_dsmoe.inference.engine.batched.forward import forward_tokens
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
from lightning_dsmoe.routing import (
    AllExperts,
    MixtureOutput,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
    routed_layers,
)

from ....pairwise import pairwise
from ..conftest import (
    SELECTIONS,
    MakeDecoder,
    V,
    assert_near,
    learned_positions_glu,
    packed,
    rotary_mlp,
    uniform,
    unlike_layers,
    without_routers,
)

DECODERS = [rotary_mlp, learned_positions_glu, without_routers, unlike_layers]
GROUPED = [False, True]


@pytest.fixture(params=GROUPED, ids=["masked", "grouped"])
def grouped(request: pytest.FixtureRequest) -> bool:
    return request.param


def assert_same_routings(actual: Routings, expected: Routings) -> None:
    for layers, others in zip(actual, expected, strict=True):
        for layer, other in zip(layers, others, strict=True):
            assert (layer is None) == (other is None)
            if layer is not None and other is not None:
                assert_near(layer.logits, other.logits, 3e-6)
                assert_near(layer.probs, other.probs, 3e-6)


@pytest.mark.parametrize(
    ("selection", "make_decoder", "grouped", "batch"),
    pairwise(selection=SELECTIONS, make_decoder=DECODERS, grouped=GROUPED, batch=[1, 2, 3]),
)
@torch.no_grad()
def test_logits_and_routings_are_those_of_the_plain_decoder(
    batch: int, selection: Selection, grouped: bool, decoder: Decoder, tokens: Tensor, mask: Tensor
) -> None:
    plan, twin, tokens = uniform(selection), packed(decoder), tokens[:batch]
    for some in (None, mask[-batch:]):
        expected = decoder(tokens, plan, mask=some)
        actual = forward_tokens(twin, tokens, plan, grouped=grouped, mask=some)
        assert_near(actual.logits, expected.logits)
        assert_same_routings(actual.routings, expected.routings)
        last = forward_tokens(twin, tokens, plan, grouped=grouped, mask=some, only_last=True)
        assert last.logits.shape == (batch, 1, V)
        assert_near(last.logits, expected.logits[:, -1:])
        assert_same_routings(last.routings, expected.routings)


@pytest.mark.parametrize(
    ("selection", "make_decoder", "grouped", "padded", "lengths"),
    pairwise(
        selection=SELECTIONS,
        make_decoder=DECODERS,
        grouped=GROUPED,
        padded=[False, True],
        lengths=[(3, 1, 10), (1, 1, 5, 7)],
    ),
)
@torch.no_grad()
def test_chunks_through_caches(
    padded: bool,
    lengths: Sequence[int],
    selection: Selection,
    grouped: bool,
    decoder: Decoder,
    tokens: Tensor,
    mask: Tensor,
) -> None:
    twin, plan = packed(decoder), uniform(selection)
    cache, caches = DecoderCache(twin, 3, 14), decoder.new_caches(3, 14)
    own = twin.new_caches(3, 14)
    for part, masked in zip(tokens.split(lengths, 1), mask.split(lengths, 1), strict=True):
        some = masked if padded else None
        expected = decoder(part, plan, mask=some, caches=caches)
        for each in (cache.layers, own):
            actual = forward_tokens(twin, part, plan, grouped=grouped, mask=some, caches=each)
            assert_near(actual.logits, expected.logits)
            assert_same_routings(actual.routings, expected.routings)
    for layer, plain in zip(cache.layers, caches, strict=True):
        assert layer.length == plain.length == 14
        assert torch.equal(layer.valid, plain.valid)
        assert_near(layer.keys, plain.keys)
        assert_near(layer.values, plain.values)


@torch.no_grad()
def test_layers_of_different_selections(grouped: bool, decoder: Decoder, tokens: Tensor) -> None:
    plan = SelectionPlan.of_blocks((TopK(1), AllExperts()), (TopP(0.5), Threshold(0.7)))
    plan = plan if routed_layers(decoder) else SelectionPlan()
    actual = forward_tokens(packed(decoder), tokens, plan, grouped=grouped)
    assert_near(actual.logits, decoder(tokens, plan).logits)


@pytest.mark.parametrize(
    ("chosen", "half", "make_decoder", "grouped"),
    pairwise(
        chosen=[TopK(2), ThresholdTopK(0.8), AllExperts()],
        half=[False, True],
        make_decoder=DECODERS,
        grouped=GROUPED,
    ),
)
@torch.no_grad()
def test_eight_bits(
    half: bool, chosen: Selection, grouped: bool, decoder: Decoder, tokens: Tensor
) -> None:
    twin = packed(decoder, int8=True)
    twin = twin.bfloat16() if half else twin
    expected = twin(tokens, uniform(chosen)).logits
    actual = forward_tokens(twin, tokens, uniform(chosen), grouped=grouped).logits
    if half:  # where a token's experts nearly tie, rounding can choose others
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).abs().median() < 4e-3 * expected.abs().max()
    else:
        assert_near(actual, expected)


@pytest.mark.parametrize("chosen", [TopK(1), Threshold(1.0), TopP(0.3)], ids=str)
@torch.no_grad()
def test_grouped_layers_read_the_chosen_experts_alone(
    chosen: Selection, one_decoder: Decoder, tokens: Tensor
) -> None:
    def run() -> DecoderOutput:
        return forward_tokens(twin, tokens[:1, :1], uniform(chosen), grouped=True)

    twin = packed(one_decoder)
    expected = run()
    n_idle = 0
    for layer, block in enumerate(twin.blocks):
        owners = (block.feed_forward.experts, block.attention.heads)
        routings = (expected.routings.experts[layer], expected.routings.attention[layer])
        for owner, routing in zip(owners, routings, strict=True):
            idle = ~chosen(routing.probs).active.flatten(0, 1).any(0)
            n_idle += int(idle.sum())
            for rows in owner.children():
                if isinstance(rows, RowMajorWeights):
                    rows.weight[idle] = torch.nan
            for name in ("b_in", "b_q"):
                if getattr(owner, name, None) is not None:
                    getattr(owner, name)[idle] = torch.nan
    assert n_idle >= 8
    assert torch.equal(run().logits, expected.logits)
    masked = forward_tokens(twin, tokens[:1, :1], uniform(chosen), grouped=False)
    assert masked.logits.isnan().any()


@torch.no_grad()
def test_layers_in_which_grouping_does_not_pay_run_all_experts(
    one_decoder: Decoder, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def never(*args: Any) -> bool:
        asked.append(args)
        return False

    monkeypatch.setattr(grouped_layers, "grouping_pays", never)
    twin, plan, first = packed(one_decoder), uniform(TopK(1)), tokens[:1, :7]
    actual = forward_tokens(twin, first, plan, grouped=True)
    assert torch.equal(actual.logits, forward_tokens(twin, first, plan, grouped=False).logits)
    routings = [
        routing
        for layer in zip(actual.routings.attention, actual.routings.experts, strict=True)
        for routing in layer
    ]
    assert len(asked) == len(routings)
    for routing, (counts, n_tokens, n_experts, macs, d_model), expected in zip(
        routings, asked, macs_of_layers(twin, 7), strict=True
    ):
        active = TopK(1)(routing.probs).active.flatten(0, 1)
        assert counts == active.sum(0).tolist()
        assert (n_tokens, n_experts) == tuple(active.shape)
        assert macs == expected
        assert d_model == twin.embedding.weight.shape[1]


def macs_of_layers(twin: Decoder, length: int) -> Iterator[int]:
    """Of one expert for one token, alternating between attention and feed-forward layers."""
    for block in twin.blocks:
        heads, experts = block.attention.heads, block.feed_forward.experts
        width = heads.n_heads * heads.d_head
        yield 2 * width * twin.embedding.weight.shape[1] + 2 * width * length
        yield (experts.w_in.weight.numel() + experts.w_out.weight.numel()) // experts.n_experts


@torch.no_grad()
def test_a_model_without_unused_experts_takes_the_method_of_the_whole_one(
    one_decoder: Decoder, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[tuple[Any, ...]]] = []

    def pays(counts: list[int], *args: int) -> bool:
        asked[-1].append(([count for count in counts if count], *args))
        return True

    monkeypatch.setattr(grouped_layers, "grouping_pays", pays)
    plan, first = uniform(TopK(1)), tokens[:1, :1]
    asked.append([])
    routings = forward_tokens(packed(one_decoder), first, plan, grouped=True).routings
    used = Remaining(*(tuple((int(r.probs.argmax()),) for r in kind) for kind in routings))
    asked.append([])
    forward_tokens(packed(prune(one_decoder, used)), first, plan, grouped=True)
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("shape", "chosen", "make_decoder"),
    pairwise(
        shape=[(0, 5), (2, 0), (0, 0)],
        chosen=[TopK(2), ThresholdTopK(1.0), AllExperts()],
        make_decoder=DECODERS,
    ),
)
@torch.no_grad()
def test_no_tokens(chosen: Selection, shape: tuple[int, int], decoder: Decoder) -> None:
    tokens = torch.zeros(shape, dtype=torch.long)
    actual = forward_tokens(packed(decoder), tokens, uniform(chosen), grouped=False)
    assert actual.logits.shape == (*shape, V)


class Doubling(FeedForwardLayer):
    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        return MixtureOutput(2 * x, None)


@torch.no_grad()
def test_a_layer_of_another_class(make_decoder: MakeDecoder, grouped: bool, tokens: Tensor) -> None:
    decoder = make_decoder()
    decoder.blocks[0].feed_forward = Doubling()
    actual = forward_tokens(packed(decoder), tokens, uniform(TopK(1)), grouped=grouped)
    expected = decoder(tokens, uniform(TopK(1)))
    assert_near(actual.logits, expected.logits)
    assert_same_routings(actual.routings, expected.routings)


class Unchanged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def test_a_norm_that_returns_its_input(
    make_decoder: MakeDecoder, grouped: bool, tokens: Tensor
) -> None:
    decoder = make_decoder()
    for block in decoder.blocks:
        block.attention_norm, block.feed_forward_norm = Unchanged(), Unchanged()
    plan = uniform(TopK(2))
    actual = forward_tokens(packed(decoder), tokens, plan, grouped=grouped).logits
    assert_near(actual, decoder(tokens, plan).logits)


def test_more_tokens_than_learned_positions_are_refused() -> None:
    twin = packed(learned_positions_glu())
    plan, cache = uniform(AllExperts()), DecoderCache(twin, 1, 200)
    start = torch.zeros(1, 60, dtype=torch.long)
    forward_tokens(twin, start, plan, grouped=False, caches=cache.layers)
    for tokens, caches in ((91, None), (31, cache.layers)):
        more = torch.zeros(1, tokens, dtype=torch.long)
        with pytest.raises(ValueError, match="91 tokens, but this model has 90 learned positions"):
            forward_tokens(twin, more, plan, grouped=False, caches=caches)
