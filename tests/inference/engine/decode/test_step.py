"""The parts of a decode step, token by token, against the plain decoder and its own caches."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForwardLayer
from lightning_dsmoe.inference import Remaining, prune
from lightning_dsmoe.inference.engine.decode.step import BlockStep
from lightning_dsmoe.inference.engine.weights.packing import tile_weights
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
from lightning_dsmoe.routing import (
    AllExperts,
    MixtureOutput,
    Selection,
    SelectionPlan,
    Threshold,
    TopK,
    TopP,
    routed_layers,
)

from ....pairwise import pairwise
from ..conftest import (
    DECODERS,
    SELECTIONS,
    MakeDecoder,
    V,
    assert_near,
    in_steps,
    packed,
    rotary_mlp,
    token_by_token,
    uniform,
)


@pytest.mark.parametrize(
    ("selection", "make", "n_sequences", "int8"),
    pairwise(selection=SELECTIONS, make=DECODERS, n_sequences=[1, 3, 12], int8=[False, True]),
)
def test_each_token_is_that_of_the_plain_decoder(
    selection: Selection, make: MakeDecoder, n_sequences: int, int8: bool, tokens: Tensor
) -> None:
    decoder, plan = make(), uniform(selection)
    twin = packed(decoder, int8=int8)
    tokens = tokens[:n_sequences] if n_sequences <= 3 else torch.randint(V, (n_sequences, 4))
    expected = token_by_token(twin, plan, tokens, 0)
    rounding = 4e-6 if int8 or n_sequences > 3 else 2e-6
    for layout in (twin, tile_weights(twin, 2)):
        assert_near(in_steps(layout, plan, tokens, 0), expected, rounding)
    trained = token_by_token(decoder, plan, tokens, 0)
    if int8:
        assert (expected - trained).abs().max() > 1e-3
    else:
        assert_near(expected, trained)


@pytest.mark.parametrize(
    ("selection", "remaining", "n_sequences"),
    pairwise(
        selection=SELECTIONS,
        remaining=[((0, 3, 4), (1, 2)), ((2,), (0,))],
        n_sequences=[1, 3],
    ),
)
def test_experts_that_remain(
    selection: Selection,
    remaining: tuple[tuple[int, ...], tuple[int, ...]],
    n_sequences: int,
    one_decoder: Decoder,
    tokens: Tensor,
) -> None:
    experts, attention = remaining
    pruned = prune(one_decoder, Remaining((None, experts), (attention, None)))
    tokens, plan, twin = tokens[:n_sequences], uniform(selection), packed(pruned)
    expected = token_by_token(pruned, plan, tokens, 0)
    for layout in (twin, tile_weights(twin, 2)):
        assert_near(in_steps(layout, plan, tokens, 0), expected, 3e-6)


@pytest.mark.parametrize(
    ("selection", "make", "n_sequences"),
    pairwise(selection=SELECTIONS, make=DECODERS, n_sequences=[2, 3]),
)
def test_padding_is_never_looked_at(
    selection: Selection, make: MakeDecoder, n_sequences: int, tokens: Tensor, mask: Tensor
) -> None:
    decoder = make()
    tokens, mask, plan = tokens[:n_sequences], mask[:n_sequences], uniform(selection)
    found = in_steps(packed(decoder), plan, tokens, 9, mask)
    expected = token_by_token(decoder, plan, tokens, 9, mask)[:, 9:]
    assert_near(found, expected)
    unpadded = token_by_token(decoder, plan, tokens, 9)[:, 9:]
    assert (found[1:] - unpadded[1:]).abs().max() > 0.1


def test_layers_of_different_selections(decoder: Decoder, tokens: Tensor) -> None:
    plan = SelectionPlan.of_blocks((TopK(1), Threshold(0.7)), (TopP(0.5), AllExperts()))
    plan = plan if routed_layers(decoder) else SelectionPlan()
    for some in (tokens, tokens[:1]):
        found = in_steps(packed(decoder), plan, some, 0)
        assert_near(found, token_by_token(decoder, plan, some, 0))


@pytest.mark.parametrize("int8", [False, True])
def test_half_precision(int8: bool, decoder: Decoder, tokens: Tensor) -> None:
    twin = packed(decoder, int8=int8).bfloat16()
    found = in_steps(twin, uniform(AllExperts()), tokens, 0)
    expected = token_by_token(twin, uniform(AllExperts()), tokens, 0)
    assert_near(found, expected, 3e-2 if int8 else 2e-2)  # 8-bit matrices are rounded once more


@pytest.mark.parametrize("chosen", [Threshold(0.9), TopK(1)], ids=str)
@pytest.mark.parametrize("n_sequences", [1, 2])
@torch.no_grad()
def test_only_the_chosen_experts_are_read(
    n_sequences: int, chosen: Selection, one_decoder: Decoder, tokens: Tensor
) -> None:
    block, x_TD = packed(one_decoder).blocks[0], torch.randn(n_sequences, 48)
    sound = copy.deepcopy(block)
    x_TXD = x_TD[:, None]
    out = sound(x_TXD, chosen, chosen)  # each token a sequence of its own
    layers = ((block.feed_forward.experts, out.experts), (block.attention.heads, out.attention))
    for owner, routing in layers:
        idle = ~chosen(routing.probs).active.flatten(0, 1).any(0)
        assert 0 < idle.sum() < len(idle)
        weights = [m.weight for m in owner.children() if isinstance(m, RowMajorWeights)]
        weights += [b for b in (getattr(owner, n, None) for n in ("b_in", "b_q")) if b is not None]
        assert len(weights) >= 2
        for weight in weights:
            weight[idle] = torch.nan
    found, expected = (
        BlockStep(b, chosen, chosen)(
            x_TD,
            torch.zeros(2, n_sequences, 2, 8),
            torch.zeros(2, n_sequences, 2, 8),
            torch.tensor([[True], [False]]).expand(2, n_sequences),
            torch.tensor([0]),
            torch.ones(n_sequences, 1, 8),
            torch.zeros(n_sequences, 1, 8),
        )
        for b in (block, sound)
    )
    assert torch.equal(found, expected)
    assert_near(found, out.x[:, 0])


class Derived(GroupedQueryAttention):
    def forward(self, x: Tensor, *args: object, **options: object) -> MixtureOutput:
        return MixtureOutput(x.clone(), None)


class OwnFeedForward(FeedForwardLayer):
    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        return MixtureOutput(x.clone(), None)


def test_layers_of_other_classes_are_refused() -> None:
    block = packed(rotary_mlp()).blocks[0]
    for name, layer in (("attention", nn.Identity()), ("feed_forward", OwnFeedForward())):
        other = copy.deepcopy(block)
        setattr(other, name, layer)
        with pytest.raises(TypeError, match=f"a {type(layer).__name__} has no decode step of its"):
            BlockStep(other, TopK(1), TopK(1))


def test_layers_that_only_derive_from_known_ones_are_refused() -> None:
    block = packed(rotary_mlp()).blocks[0]
    block.attention = Derived(48, 2, 2, 8)
    with pytest.raises(TypeError, match="a Derived has no decode step of its own"):
        BlockStep(block, TopK(1), TopK(1))
