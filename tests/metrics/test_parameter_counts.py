from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import GLUExperts, MixtureOfExperts
from lightning_dsmoe.inference import Remaining, prune
from lightning_dsmoe.metrics import (
    ParameterCounts,
    RoutedParameters,
    active_parameters,
    count_parameters,
)
from lightning_dsmoe.routing import OutputOnly, SelectionPlan, TopK, record_routings, run_plan

D = 8


def test_hand_count_of_a_small_model(small_decoder: Decoder) -> None:
    layer = 2 * 32 + 2 * 4 * 32 + 32 * 2 * 8  # norms, routers, keys and values
    assert count_parameters(small_decoder) == ParameterCounts(
        outside=97 * 32,
        always=2 * layer + 32,
        layers={
            f"blocks.{block}.{name}": RoutedParameters(4, size)
            for block in range(2)
            for name, size in (("attention", 2 * 8 * 32), ("feed_forward", 3 * 24 * 32))
        },
    )


def test_biases_shared_expert_positions_and_untied_head() -> None:
    decoder = Decoder(
        10,
        D,
        1,
        attention=partial(MixtureOfAttentionHeads, n_experts=3, n_heads=2, d_head=4, bias=True),
        feed_forward=partial(
            MixtureOfExperts,
            n_experts=5,
            d_expert=6,
            d_shared=7,
            experts=partial(GLUExperts, bias=True),
        ),
        norm=nn.LayerNorm,
        max_positions=12,
        tie_embeddings=False,
    )
    shared = 3 * 7 * D + 2 * 7 + D
    attention_always = 3 * D + (D + 1) * 2 * 8 + D
    experts_always = 5 * D + D + shared
    assert count_parameters(decoder) == ParameterCounts(
        outside=2 * 10 * D + 12 * D,
        always=attention_always + experts_always + 3 * 2 * D,
        layers={
            "blocks.0.attention": RoutedParameters(3, 2 * 8 * D + 8),
            "blocks.0.feed_forward": RoutedParameters(5, 3 * 6 * D + 2 * 6),
        },
    )


def test_layers_may_differ(mixed_decoder: Decoder) -> None:
    assert count_parameters(mixed_decoder).layers == {
        "blocks.1.feed_forward": RoutedParameters(3, 2 * 5 * D),
        "blocks.2.attention": RoutedParameters(2, 2 * 4 * D),
    }


def test_counts_add_up(decoder: Decoder) -> None:
    counts = count_parameters(decoder)
    assert counts.outside + counts.hidden == sum(p.numel() for p in decoder.parameters())


def test_meta_device_counts_the_same(decoder: Decoder) -> None:
    counts = count_parameters(decoder)
    assert count_parameters(decoder.to("meta")) == counts


def test_removed_experts_still_count(small_decoder: Decoder) -> None:
    pruned = prune(small_decoder, Remaining(((0,), (1, 2, 3)), (None, (0, 3))))
    assert count_parameters(pruned) == count_parameters(small_decoder)


class Encoder(nn.Module):
    """A vision-like encoder: patches, a block that runs twice, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, D)
        self.attention = MixtureOfAttentionHeads(D, 3, 1, 4)
        self.mlp = OutputOnly(MixtureOfExperts(D, 5, 6))
        self.again = self.mlp
        self.classifier = nn.Linear(D, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = x + self.attention(x).output
        x = x + self.mlp(x)
        y: Tensor = self.classifier((x + self.again(x)).mean(1))
        return y


class Generating(nn.Module):
    """As models of transformers are: it says what projects to its vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.mlp = MixtureOfExperts(D, 3, 4)
        self.lm_head = nn.Linear(D, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


ROUTED = {"attention": RoutedParameters(3, 2 * 4 * D), "mlp.layer": RoutedParameters(5, 2 * 6 * D)}


def test_any_model() -> None:
    always = 5 * D + (3 * D + 2 * 4 * D) + 5 * D
    whole = count_parameters(Encoder())
    assert whole == ParameterCounts(0, always + 7 * (D + 1), ROUTED)
    without = count_parameters(Encoder(), outside=["classifier", "patches"])
    assert without == ParameterCounts(7 * (D + 1) + 5 * D, always - 5 * D, ROUTED)
    with pytest.raises(ValueError, match="outside: Encoder has no module 'clasifier'"):
        count_parameters(Encoder(), outside=["clasifier"])


def test_a_layer_that_runs_twice_runs_what_either_call_runs() -> None:
    model, x = Encoder(), torch.randn(2, 3, 4)
    counts = count_parameters(model)
    plan = SelectionPlan(experts=TopK(2), attention=TopK(1))
    with torch.no_grad(), run_plan(model, plan), record_routings(model) as record:
        model(x)
    share = active_parameters(counts, record.active_masks())
    first, second = record.routings["mlp.layer"].probs.chunk(2)
    total = 0
    for b in range(2):
        for t in range(3):
            chosen = {e for probs in (first, second) for e in probs[b, t].topk(2).indices.tolist()}
            total += counts.always + 2 * 4 * D + len(chosen) * 2 * 6 * D
    assert share.mean.item() == pytest.approx(total / 6 / counts.hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_output_embeddings_are_outside(tied: bool) -> None:
    model = Generating()
    if tied:
        model.lm_head.weight = model.embed.weight
    assert count_parameters(model).outside == (1 if tied else 2) * 11 * D


def test_without_routed_layers_everything_always_runs() -> None:
    assert count_parameters(nn.Linear(3, 2)) == ParameterCounts(0, 8, {})
