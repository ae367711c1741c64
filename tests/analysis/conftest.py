from functools import partial
from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut, MeasuredText, evaluate_plan
from lightning_dsmoe.analysis.plans.routing_statistics import Statistics, routing_statistics
from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference import SparseModel, SwitchPoints, compile_sparse
from lightning_dsmoe.metrics import ParameterCounts, count_parameters
from lightning_dsmoe.routing import LinearRouter, SelectionPlan, Threshold
from lightning_dsmoe.routing.routing import Kind, block_layer_name

ROUTER = partial(LinearRouter, init_std=0.2)


def make_decoder() -> Decoder:
    """The same for every test, so that what is measured of it can be shared."""
    torch.manual_seed(1234)
    made = Decoder(
        29,
        16,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=3, n_heads=1, d_head=4, router=ROUTER),
        feed_forward=partial(MixtureOfExperts, n_experts=5, d_expert=6, router=ROUTER),
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "router" not in name:
                parameter.mul_(3)
    return made.eval()


def make_text(decoder: Decoder) -> HeldOut:
    """Random text, followed by what the model finds most probable."""
    tokens = torch.randint(29, (6, 2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        batches = [(part, decoder(part).logits.argmax(-1)) for part in tokens]
    batches[-1][1][1, 5:] = -100
    return HeldOut(batches, 6 * 2 * 16 - 11)


@pytest.fixture
def decoder() -> Decoder:
    return make_decoder()


@pytest.fixture
def counts(decoder: Decoder) -> ParameterCounts:
    return count_parameters(decoder)


@pytest.fixture
def model(decoder: Decoder) -> SparseModel:
    plan = SelectionPlan()
    return compile_sparse(decoder, plan, switch_points=SwitchPoints(gather_up_to=0))


@pytest.fixture
def text(decoder: Decoder) -> HeldOut:
    return make_text(decoder)


@pytest.fixture
def statistics(model: SparseModel, text: HeldOut, counts: ParameterCounts) -> Statistics:
    return routing_statistics(MeasuredText(model, text, counts))


@pytest.fixture
def measure(model: SparseModel, text: HeldOut, counts: ParameterCounts) -> Any:
    """Measures in one batch, as searches measure many plans."""
    inputs, labels = (torch.cat(parts) for parts in zip(*text.batches, strict=True))
    whole = HeldOut([(inputs, labels)], text.n_tokens)
    return lambda plan: evaluate_plan(model, plan, whole, counts)


def share_of(statistics: Statistics, plan: SelectionPlan) -> float:
    selections = plan.selections(statistics.layers)
    return statistics.share(
        {
            name: selection.eps if isinstance(selection, Threshold) else 0.0
            for name, selection in selections.items()
        }
    )


def in_block(plan: SelectionPlan, block: int, kind: Kind) -> Any:
    """What a plan runs in a layer of the decoder, such as a Threshold or a TopK."""
    return plan.layers.get(block_layer_name(block, kind), getattr(plan, kind))
