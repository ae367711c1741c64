"""Decoders without some of their experts."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts, MLPExperts
from lightning_dsmoe.inference import Remaining, compile_sparse, generate, load_sparse, prune
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.packing import pack
from lightning_dsmoe.routing import (
    CosineRouter,
    MLPRouter,
    Selection,
    SelectionPlan,
    Threshold,
    TopK,
)
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder
from lightning_dsmoe.serialization.checkpoint import fill
from lightning_dsmoe.serialization.pruning import remaining_experts

from ..inference.conftest import (
    ATTENTION,
    FEED_FORWARD,
    UNCOMPILED,
    MakeDecoder,
    assert_near,
    learned_positions_mlp,
    rotary_glu,
    sign,
    without_routers,
)
from ..routing.among import SELECTIONS, Among

REMAINING = Remaining(((0, 3), None), ((1, 2), (2,)))
WAYS = {"masked": 10**6, "grouped": 1}


class OwnExperts(MLPExperts):
    """Experts with a scale of their own each, which nobody knows of."""

    def __init__(self, d_model: int, n_experts: int, d_expert: int) -> None:
        super().__init__(d_model, n_experts, d_expert)
        self.scale = nn.Parameter(torch.ones(n_experts, 1))

    def hidden(self, projected: Tensor) -> Tensor:
        return super().hidden(projected) * self.scale


class OwnMixture(MixtureOfExperts):
    pass


def paper_gates() -> Decoder:
    return rotary_glu(
        attention=partial(
            ATTENTION, gate_scale="sum_to_one", router=partial(MLPRouter, d_hidden=5, init_std=1)
        ),
        feed_forward=partial(
            FEED_FORWARD,
            gate_scale="sum_to_one",
            router=partial(CosineRouter, d_hidden=3, init_scale=8.0),
        ),
    )


@pytest.fixture(params=[rotary_glu, learned_positions_mlp, paper_gates])
def make_decoder(request: pytest.FixtureRequest) -> MakeDecoder:
    return request.param


def uniform(selection: Selection) -> SelectionPlan:
    return SelectionPlan(experts=selection, attention=selection)


def plan_among(plan: SelectionPlan, remaining: Remaining, decoder: Decoder) -> SelectionPlan:
    """A plan of the whole decoder that runs what a pruned one does under `plan`."""
    experts, attention = (
        tuple(
            Among(selection, numbers or range(size or 0))
            for selection, numbers, size in zip(selections, layers, sizes, strict=True)
        )
        for selections, layers, sizes in zip(
            decoder.selections(plan), remaining, decoder.plan_sizes, strict=True
        )
    )
    return SelectionPlan.of_blocks(experts, attention)  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_it_does_what_the_whole_decoder_does_with_the_experts_that_remain(
    selection: Selection, decoder: Decoder, tokens: Tensor
) -> None:
    plan = uniform(selection)
    pruned = prune(decoder, REMAINING)
    exact = copy.deepcopy(decoder).double()
    expected = exact(tokens, plan_among(plan, REMAINING, decoder)).logits
    assert_near(prune(exact, REMAINING)(tokens, plan).logits, expected, relative=1e-12)
    alike = pruned(tokens, plan).logits
    for grouped_from in WAYS.values():
        points = SwitchPoints(gather_up_to=0, grouped_from=grouped_from)
        model = compile_sparse(pruned, plan, switch_points=points)
        assert_near(model.logits(tokens), alike, relative=4e-6)


def test_others_are_gone_and_the_decoder_stays(decoder: Decoder) -> None:
    before = copy.deepcopy(decoder)
    pruned = prune(decoder, REMAINING)
    for name, parameter in decoder.state_dict().items():
        assert torch.equal(parameter, before.state_dict()[name])
    own = dict(pruned.named_parameters())
    for name, parameter in before.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        kind = "experts" if "feed_forward.experts" in name else "attention"
        stacked = name.endswith(
            ("w_in.weight", "w_out.weight", "b_in", "w_q.weight", "w_o.weight", "b_q")
        )
        numbers = getattr(REMAINING, kind)[layer] if stacked and "shared" not in name else None
        expected = parameter if numbers is None else parameter[list(numbers)]
        assert torch.equal(own[name], expected)
        assert own[name].requires_grad
    assert pruned.plan_sizes == decoder.plan_sizes
    assert remaining_experts(decoder) is None
    assert remaining_experts(pruned) == REMAINING


def test_all_of_them_are_none_removed(one_decoder: Decoder) -> None:
    everyone = Remaining(((0, 1, 2, 3), None), ((0, 1, 2), None))
    assert remaining_experts(prune(one_decoder, everyone)) is None
    assert "remaining" not in describe_decoder(prune(one_decoder, everyone))


def test_in_two_goes(one_decoder: Decoder, tokens: Tensor, plan: SelectionPlan) -> None:
    first = Remaining(((0, 2, 3), None), ((1, 2), (0, 2)))
    twice = prune(prune(one_decoder, first), REMAINING)
    assert remaining_experts(twice) == REMAINING
    expected = prune(one_decoder, REMAINING)(tokens, plan).logits
    assert torch.equal(twice(tokens, plan).logits, expected)


def test_it_still_trains(one_decoder: Decoder, tokens: Tensor) -> None:
    pruned = prune(one_decoder, REMAINING).train()
    pruned(tokens).logits.logsumexp(-1).mean().backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("remaining", "message"),
    [
        (Remaining(((0,),), ((0,),)), "remaining experts of 1 layers, a model of 2"),
        (Remaining(((), None), (None, None)), r"layer 0, experts: .* that are present, got \(\)"),
        (Remaining((None, (1, 0)), (None, None)), r"layer 1, experts: .* got \(1, 0\)"),
        (Remaining((None, (1, 1)), (None, None)), r"layer 1, experts: .* got \(1, 1\)"),
        (Remaining((None, None), ((0, 3), None)), r"layer 0, attention: .* got \(0, 3\)"),
        (Remaining((None, None), ((-1, 0), None)), r"layer 0, attention: .* got \(-1, 0\)"),
    ],
)
def test_experts_that_there_are_not(
    remaining: Remaining, message: str, one_decoder: Decoder
) -> None:
    with pytest.raises(ValueError, match=message):
        prune(one_decoder, remaining)


def test_layers_that_cannot_lose_experts(one_decoder: Decoder) -> None:
    some = Remaining(((0, 1), None), (None, None))
    with pytest.raises(ValueError, match="layer 0, experts: there is no mixture to remove"):
        prune(without_routers(), some)
    own = partial(OwnMixture, n_experts=4, d_expert=6)
    with pytest.raises(ValueError, match="layer 0, experts: there is no mixture to remove"):
        prune(rotary_glu(feed_forward=own), some)
    strange = partial(FEED_FORWARD, experts=OwnExperts)
    with pytest.raises(ValueError, match=r"layer 0, experts: .* weights are known, got scale"):
        prune(rotary_glu(feed_forward=strange), some)
    pack(one_decoder)
    with pytest.raises(ValueError, match=r"before a model is compiled, .* got a compiled model"):
        prune(one_decoder, some)


def test_the_architecture_tells_what_remains(decoder: Decoder, tokens: Tensor) -> None:
    pruned = prune(decoder, REMAINING)
    description = json.loads(json.dumps(describe_decoder(pruned)))
    assert description.pop("remaining") == {
        "experts": [[0, 3], None],
        "attention": [[1, 2], [2]],
    }
    assert description == describe_decoder(decoder)
    rebuilt = build_decoder(describe_decoder(pruned))
    assert all(tensor.is_meta for tensor in rebuilt.parameters())
    fill(rebuilt, pruned.state_dict())
    assert torch.equal(rebuilt(tokens).logits, pruned(tokens).logits)


@pytest.mark.parametrize(
    ("remaining", "message"),
    [
        (None, "remaining must be an object, got None"),
        ([[0], [0]], "remaining must be an object, got"),
        ({"experts": [None, None]}, "remaining must have the fields"),
        ({"experts": None, "attention": [None, None]}, "experts must be a list, got None"),
        ({"experts": [None], "attention": [None, None]}, "remaining experts of 1 layers"),
        ({"experts": [0, None], "attention": [None, None]}, "must be null or a list, got 0"),
        ({"experts": [[True], None], "attention": [None, None]}, "must be an integer, got"),
        ({"experts": [[0.0], None], "attention": [None, None]}, "must be an integer, got"),
        ({"experts": [["0"], None], "attention": [None, None]}, "must be an integer, got"),
        ({"experts": [[4], None], "attention": [None, None]}, "ascending numbers of experts"),
        ({"experts": [[10**30], None], "attention": [None, None]}, "ascending numbers of experts"),
        ({"experts": [[], None], "attention": [None, None]}, "ascending numbers of experts"),
    ],
)
def test_architectures_with_impossible_numbers(
    remaining: Any, message: str, one_decoder: Decoder
) -> None:
    with pytest.raises(ValueError, match=message):
        build_decoder(describe_decoder(one_decoder) | {"remaining": remaining})


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_artifacts(
    quantization: Any,
    make_decoder: MakeDecoder,
    plan: SelectionPlan,
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    decoder = make_decoder()
    whole = compile_sparse(decoder, plan, quantization=quantization, switch_points=UNCOMPILED)
    model = compile_sparse(
        prune(decoder, REMAINING), plan, quantization=quantization, switch_points=UNCOMPILED
    )
    whole.save(tmp_path / "whole")
    model.save(tmp_path / "pruned")
    loaded = load_sparse(tmp_path / "pruned")
    assert loaded.plan == plan
    assert remaining_experts(loaded.decoder) == REMAINING
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    prompts = tokens[:, :3]
    continued = loaded.generate(prompts, 5, temperature=0)
    assert torch.equal(continued, model.generate(prompts, 5, temperature=0))

    kept, all_kept = (
        load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "whole")
    )
    assert kept.keys() == all_kept.keys()
    for name, tensor in kept.items():
        before = all_kept[name]
        if tensor.shape != before.shape:
            kind = "experts" if "feed_forward" in name else "attention"
            numbers = getattr(REMAINING, kind)[int(name.split(".")[1])]
            before = before[list(numbers)]
        assert torch.equal(tensor, before)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("pruned", "whole")]
    gone = sum(all_kept[name].nbytes - kept[name].nbytes for name in kept)
    assert gone > 0
    assert abs(sizes[1] - sizes[0] - gone) < 200  # the header


def test_an_artifact_of_more_experts_than_its_weights(
    one_decoder: Decoder, plan: SelectionPlan, tmp_path: Path
) -> None:
    model = compile_sparse(prune(one_decoder, REMAINING), plan)
    model.save(tmp_path / "model")
    compile_sparse(one_decoder, plan).save(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "model")
    sign(tmp_path / "model")
    with pytest.raises(ValueError, match=r"weights are another model's: .* is .*, not"):
        load_sparse(tmp_path / "model")
    model.architecture = describe_decoder(one_decoder)
    with pytest.raises(ValueError, match=r"weights are another model's: .* is .*, not"):
        model.save(tmp_path / "model")


def test_generation_without_an_engine(
    decoder: Decoder, plan: SelectionPlan, tokens: Tensor
) -> None:
    pruned = prune(decoder, REMAINING)
    model = compile_sparse(pruned, plan, switch_points=UNCOMPILED)
    prompts = tokens[:, :4]
    expected = generate(pruned, prompts, 6, plan=plan, temperature=0)
    assert torch.equal(model.generate(prompts, 6, temperature=0), expected)


def test_other_plans(one_decoder: Decoder, tokens: Tensor) -> None:
    """More experts than remain are all that remain."""
    pruned = prune(one_decoder, REMAINING)
    many = SelectionPlan(experts=TopK(4), attention=TopK(3))
    assert_near(pruned(tokens, many).logits, pruned(tokens).logits)
    with pytest.raises(ValueError, match="k <= 4"):
        compile_sparse(pruned, SelectionPlan(experts=TopK(5)))
    high = SelectionPlan(experts=Threshold(3.9), attention=Threshold(2.9))
    assert pruned(tokens, high).logits.isfinite().all()
