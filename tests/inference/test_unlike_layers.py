"""Sparse models of decoders with layers that differ and with the options of published models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import Remaining, compile_sparse, load_sparse, prune
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK
from lightning_dsmoe.serialization.architecture import describe_decoder

from .conftest import UNCOMPILED, assert_near
from .engine.conftest import V, unlike_layers

MASKED = SwitchPoints(gather_up_to=0, grouped_from=10**6)
PLANS = [
    SelectionPlan(),
    SelectionPlan(experts=TopK(2, renormalize=True), attention=TopK(1)),
    SelectionPlan(experts=Threshold(0.8), layers={"blocks.1.attention": TopK(2)}),
]


@pytest.fixture
def decoder() -> Decoder:
    return unlike_layers()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("plan", PLANS, ids=["all", "top k", "threshold"])
@pytest.mark.parametrize("points", [UNCOMPILED, MASKED], ids=["grouped", "masked"])
@torch.no_grad()
def test_all_tokens_at_once_and_one_by_one_are_those_of_the_decoder(
    points: SwitchPoints, plan: SelectionPlan, decoder: Decoder, tokens: Tensor
) -> None:
    model = compile_sparse(decoder, plan, switch_points=points)
    expected = decoder(tokens, plan).logits
    assert_near(model.logits(tokens), expected)
    caches = decoder.new_caches(3, 16)
    assert [cache.keys.shape[1::2] for cache in caches] == [(3, 10), (2, 8)]
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1, :5] = False
    parts = zip(tokens.split([9, 1, 6], 1), mask.split([9, 1, 6], 1), strict=True)
    pieces = [decoder(t, plan, mask=m, caches=caches).logits for t, m in parts]
    masked = model.logits(tokens, mask=mask)
    assert_near(masked, torch.cat(pieces, 1))
    assert_near(masked[1, 5:], decoder(tokens[1:2, 5:], plan).logits[0])
    reader = model.engine.open(3, 16, plan)
    one_by_one = [reader.read(tokens[:, :9])]
    one_by_one += [reader.read(some) for some in tokens[:, 9:].split(1, 1)]
    assert_near(torch.stack(one_by_one, 1), expected[:, 8:])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_saved_and_loaded_it_is_the_same(
    quantization: Any, decoder: Decoder, tokens: Tensor, tmp_path: Path
) -> None:
    model = compile_sparse(decoder, PLANS[1], quantization=quantization, switch_points=UNCOMPILED)
    model.save(tmp_path / "model")
    loaded = load_sparse(tmp_path / "model")
    assert loaded.architecture == describe_decoder(decoder)
    assert isinstance(loaded.architecture["attention"], list)
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    greedy = [each.generate(tokens, 5, temperature=0) for each in (model, loaded)]
    assert torch.equal(*greedy)


def test_pruned_it_runs_the_same_plans(decoder: Decoder, tokens: Tensor) -> None:
    smaller = prune(decoder, Remaining(((0, 2, 4), None), (None, (1, 2))))
    description = describe_decoder(smaller)
    assert description["remaining"] == {
        "experts": [[0, 2, 4], None],
        "attention": [None, [1, 2]],
    }
    model = compile_sparse(smaller, PLANS[1], switch_points=UNCOMPILED)
    assert_near(model.logits(tokens), smaller(tokens, PLANS[1]).logits)
