"""Plans and records on models whose `forward` knows nothing of them.

Shapes: B sequences, T positions, D width, E experts.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_dsmoe import (
    AllExperts,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    OutputOnly,
    RoutingLoss,
    SelectionPlan,
    Threshold,
    TopK,
    mutual_information_loss,
    record_routings,
    routed_layers,
    run_plan,
)
from lightning_dsmoe.routing import LinearRouter, MixtureOutput, RoutedLayer, Routing, Selection

from ..ranks import on_two_ranks

B, T, D = 2, 5, 8
NAMES = ["blocks.0.attention", "blocks.0.mlp.layer", "blocks.1.attention", "blocks.1.mlp.layer"]
ALL = AllExperts()
PLAN = SelectionPlan(TopK(1), TopK(2), {"blocks.1.mlp.layer": Threshold(0.9)})


class Block(nn.Module):
    """Of somebody else: it hands no selection on and drops every routing."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MixtureOfAttentionHeads(D, 3, 1, 4)
        self.mlp = OutputOnly(MixtureOfExperts(D, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x).output
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.recompute is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.recompute)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model()
    for layer in routed_layers(model).values():
        nn.init.normal_(layer.router.weight)  # type: ignore[arg-type]
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def by_hand(model: Model, x: Tensor, plan: SelectionPlan) -> tuple[Tensor, dict[str, Routing]]:
    """The model with all that it hands neither down nor up."""
    selections, routings = plan.selections(routed_layers(model)), {}
    x = model.stem(x)
    for number, block in enumerate(model.blocks):
        for name, layer in (("attention", block.attention), ("mlp.layer", block.mlp.layer)):  # type: ignore[union-attr]
            name = f"blocks.{number}.{name}"
            output, routings[name] = layer.forward(x, selections[name])  # type: ignore[operator, union-attr]
            x = x + output
    return x, routings


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)


def test_layers_have_their_names_in_order(model: Model) -> None:
    assert list(routed_layers(model)) == NAMES
    assert [layer.kind for layer in routed_layers(model).values()] == ["attention", "experts"] * 2
    for name, layer in routed_layers(model).items():
        assert model.get_submodule(name) is layer
    assert routed_layers(nn.Linear(1, 1)) == {}


def test_a_layer_of_two_places_is_one(model: Model) -> None:
    model.blocks[1] = model.blocks[0]
    assert list(routed_layers(model)) == NAMES[:2]


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m), nn.DataParallel], ids=["compile", "dp"]
)
def test_wrappers_are_no_part_of_a_name(
    wrap: Callable[[nn.Module], nn.Module], model: Model
) -> None:
    assert list(routed_layers(wrap(model))) == NAMES
    model.blocks[0] = wrap(model.blocks[0]) if wrap is not nn.DataParallel else model.blocks[0]
    assert list(routed_layers(model)) == NAMES


@pytest.mark.parametrize("plan", [SelectionPlan(), PLAN], ids=["dense", "sparse"])
def test_outputs_routings_and_gradients_are_those_by_hand(
    plan: SelectionPlan, model: Model, x: Tensor
) -> None:
    routing_loss = RoutingLoss(0.3, 0.2, load_balancing=0.1, router_z=0.05)
    with run_plan(model, plan), record_routings(model) as record:
        y = model(x)
    (y.square().mean() + routing_loss(record)).backward()
    found = gradients(model)
    expected, routings = by_hand(model, x, plan)
    assert torch.equal(y, expected)
    assert_same(record.routings, routings)
    selections = plan.selections(routed_layers(model))
    active = {name: selections[name].mask(r.probs) for name, r in routings.items()}  # type: ignore[attr-defined]
    assert_same(record.active_masks(), active)
    loss = expected.square().mean()
    for name, routing in routings.items():
        share = (active[name] / active[name].sum(-1, keepdim=True)).mean((0, 1))
        share = active[name].float().mean((0, 1)) / active[name].float().mean((0, 1)).sum()
        balance = routing.probs.shape[-1] * (share * routing.probs.mean((0, 1))).sum()
        z = routing.logits.logsumexp(-1).square().mean()
        mi_weight = 0.2 if "attention" in name else 0.3
        loss = loss + mi_weight * mutual_information_loss(routing.probs) + 0.1 * balance + 0.05 * z
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)


def test_a_plan_holds_over_a_selection_that_is_given(model: Model, x: Tensor) -> None:
    layer = model.blocks[0].mlp.layer  # type: ignore[union-attr]
    for call in (lambda: layer(x, TopK(3)), lambda: layer(x=x, selection=TopK(3))):  # type: ignore[operator]
        with run_plan(model, PLAN), record_routings(model) as record:
            output = call().output
        assert record.active(NAMES[1]).sum(-1).eq(1).all()
        assert torch.equal(output, layer.forward(x, TopK(1)).output)  # type: ignore[operator, union-attr]


def test_of_nested_plans_the_innermost_holds_and_all_records_are_told(
    model: Model, x: Tensor
) -> None:
    with run_plan(model, PLAN), record_routings(model) as outer:
        block, plan = model.blocks[0], SelectionPlan(TopK(2), AllExperts())
        with run_plan(block, plan), record_routings(block) as inner:
            model(x)
        assert list(inner.routings) == ["attention", "mlp.layer"]
        assert [outer.active(name).sum(-1).max() for name in NAMES[:3]] == [3, 2, 2]
        assert_same(
            inner.routings, dict(zip(inner.routings, outer.routings.values(), strict=False))
        )
        y = model(x)
    assert torch.equal(y, by_hand(model, x, PLAN)[0])
    assert torch.equal(model(x), by_hand(model, x, SelectionPlan())[0])
    assert outer.routings[NAMES[0]].probs.shape == (2 * B, T, 3)


def test_nothing_is_left_open_by_an_error(model: Model, x: Tensor) -> None:
    with pytest.raises(KeyError), run_plan(model, PLAN), record_routings(model) as record:
        raise KeyError
    assert torch.equal(model(x), by_hand(model, x, SelectionPlan())[0])
    assert record.routings == {}


def test_a_model_that_was_not_called_has_no_routings(model: Model) -> None:
    with record_routings(model) as record:
        pass
    assert record.routings == {}
    assert record.active_masks() == {}
    assert RoutingLoss()(record).item() == 0


def test_two_threads_and_two_models_do_not_mix(model: Model, x: Tensor) -> None:
    other = Model()
    opened, ran = threading.Event(), threading.Event()
    found: list[Any] = []

    def elsewhere() -> None:
        opened.wait(10)
        with record_routings(model) as record:
            found.append(model(x))
            found.append(record.active_masks())
        ran.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with run_plan(model, PLAN), record_routings(model) as record, record_routings(other) as others:
        opened.set()
        ran.wait(10)
        assert record.routings == {}
        assert torch.equal(other(x), by_hand(other, x, SelectionPlan())[0])
        assert record.routings == {}
        assert len(others.routings) == 4
    thread.join()
    assert torch.equal(found[0], by_hand(model, x, SelectionPlan())[0])
    assert all(mask.all() for mask in found[1].values())


def test_a_layer_that_is_called_several_times_has_all_tokens(x: Tensor) -> None:
    layer = MixtureOfExperts(D, 4, 6)
    model = nn.Sequential(OutputOnly(layer), OutputOnly(layer))
    mask = torch.tensor([[True] * T, [True] * 2 + [False] * 3])
    with record_routings(model, mask) as record:
        y = model(x)
    first, second = layer.router(x), layer.router(layer.forward(x).output)
    probs = torch.cat([first.probs, second.probs])
    torch.testing.assert_close(record.routings["0.layer"].probs, probs)
    assert y.shape == x.shape
    expected = 0.02 * mutual_information_loss(probs, torch.cat([mask, mask]))
    torch.testing.assert_close(RoutingLoss()(record), expected)
    with record_routings(model) as record:
        model(x), model(x[:, :2])
    assert record.routings["0.layer"].probs.shape == (B * T * 2 + B * 2 * 2, 4)


def test_of_several_calls_those_ran_that_any_call_ran(x: Tensor) -> None:
    layer = MixtureOfExperts(D, 4, 6, router=partial(LinearRouter, init_std=1.0))
    model = nn.Sequential(OutputOnly(layer), OutputOnly(layer))
    for tokens in (x, x[0]):  # flat ones, too
        with run_plan(model, SelectionPlan(TopK(1))), record_routings(model) as record:
            model(tokens)
        first = layer.router(tokens).probs
        second = layer.router(layer.forward(tokens, TopK(1)).output).probs
        expected = TopK(1).mask(first) | TopK(1).mask(second)
        assert torch.equal(record.active_masks()["0.layer"], expected)
        assert expected.sum() > expected[..., 0].numel()


def test_masked_tokens_do_not_count(model: Model, x: Tensor) -> None:
    mask = torch.tensor([[True] * T, [False] * T])
    with record_routings(model, mask) as record:
        model(x)
    with record_routings(model) as alone:
        model(x[:1])
    torch.testing.assert_close(RoutingLoss()(record), RoutingLoss()(alone))
    torch.testing.assert_close(RoutingLoss()(alone, mask[:1]), RoutingLoss()(alone))
    with record_routings(model, mask[:, 1:]) as record:
        model(x)
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 4\), but blocks\.0\.attention has"):
        RoutingLoss()(record)


@pytest.mark.parametrize("plan", [SelectionPlan(), PLAN], ids=["dense", "sparse"])
def test_what_is_recomputed_is_recorded_once_and_runs_the_plan(
    plan: SelectionPlan, model: Model, x: Tensor
) -> None:
    found = []
    for recompute in (None, False):
        model.recompute = recompute
        with run_plan(model, plan), record_routings(model) as record:
            y = model(x)
            (y.square().mean() + RoutingLoss(0.5, 0.5)(record)).backward()
        assert record.routings[NAMES[1]].probs.shape == (B, T, 4)
        found.append((y.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1])


def test_recomputing_after_a_plan_was_closed_is_an_error(model: Model, x: Tensor) -> None:
    model.recompute = False
    with run_plan(model, PLAN):
        y = model(x)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        y.sum().backward()


def test_reentrant_checkpointing_is_refused_by_the_loss(model: Model, x: Tensor) -> None:
    model.recompute = True
    with record_routings(model) as record:
        model(x.requires_grad_())
    with pytest.raises(
        RuntimeError, match=r"blocks\.0\.attention was recorded without gradients.*F"
    ):
        RoutingLoss()(record)
    with torch.no_grad():
        assert RoutingLoss()(record).isfinite()
    assert RoutingLoss().eval()(record).isfinite()


def test_autocast_leaves_routings_in_float32(model: Model, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16), record_routings(model) as record:
        y = model(x)
        loss = RoutingLoss()(record)
    assert y.dtype == torch.float32 or y.dtype == torch.bfloat16
    assert {r.probs.dtype for r in record.routings.values()} == {torch.float32}
    loss.backward()
    assert gradients(model)[f"{NAMES[1]}.router.weight"].abs().max() > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo too
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_compiled_models_are_recorded_and_run_plans(
    in_place: bool, model: Model, x: Tensor
) -> None:
    plain = {plan: by_hand(model, x, plan) for plan in (SelectionPlan(), PLAN)}
    if in_place:
        model.compile(backend="aot_eager")
    run: nn.Module = model if in_place else torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    for plan, expected in (*plain.items(), *plain.items()):
        torch.testing.assert_close(run(x), plain[SelectionPlan()][0])
        with run_plan(model, plan), record_routings(run) as record:
            y = run(x)
            y.sum().backward()
        torch.testing.assert_close(y, expected[0])
        assert list(record.routings) == NAMES
        for name, routing in record.routings.items():
            torch.testing.assert_close(routing.probs, expected[1][name].probs)


def test_a_plan_for_what_torch_compile_returned_is_refused(model: Model) -> None:
    message = "run_plan needs a model that is not compiled, and the model is what torch.compile"
    with pytest.raises(ValueError, match=message), run_plan(torch.compile(model), PLAN):  # type: ignore[arg-type]
        pass
    model.stem = torch.compile(model.stem)  # type: ignore[assignment]
    with run_plan(model, PLAN):  # what has no routed layer may be compiled
        pass
    model.blocks[0] = torch.compile(model.blocks[0])  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"and blocks\.0 is what"), run_plan(model, PLAN):
        pass


@pytest.mark.parametrize(
    ("open_it", "error", "message"),
    [
        (lambda m: run_plan(nn.Linear(1, 1), PLAN), ValueError, "run_plan needs .* has none"),
        (lambda m: record_routings(nn.Linear(1, 1)), ValueError, "record_routings needs .* none"),
        (lambda m: run_plan(m, TopK(1)), TypeError, r"such as SelectionPlan\(experts=TopK\(2\)\)"),
        (lambda m: run_plan(m, SelectionPlan(TopK(5))), ValueError, r"0\.mlp\.layer: TopK\(k=5\)"),
        (
            lambda m: run_plan(m, SelectionPlan(layers={"blocks.0.mlp": TopK(1)})),
            ValueError,
            r"no routed layer 'blocks\.0\.mlp'; the nearest names are blocks\.0\.mlp\.layer",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    open_it: Callable[[Model], Any], error: type[Exception], message: str, model: Model
) -> None:
    with pytest.raises(error, match=message) as raised, open_it(model):
        pass
    assert "\n" not in str(raised.value)


class Named(RoutedLayer):
    """Of a user: a mask stands where others have their selection."""

    def __init__(self) -> None:
        super().__init__()
        self.n_experts, self.router = 3, LinearRouter(D, 3, init_std=1.0)
        self.vectors = nn.Parameter(torch.randn(3, D))

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, *, selection: Selection = ALL
    ) -> MixtureOutput:
        routing = self.router(hidden)
        return MixtureOutput(hidden + selection(routing.probs).weight @ self.vectors, routing)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_layer_may_take_its_selection_by_name(by_name: bool, x: Tensor) -> None:
    model, mask = nn.ModuleList([Named()]), torch.ones(B, T)
    with run_plan(model, SelectionPlan(TopK(1))), record_routings(model) as record:
        found = model[0](hidden=x, mask=mask) if by_name else model[0](x, mask)
    assert torch.equal(found.output, model[0].forward(x, mask, selection=TopK(1)).output)
    assert record.active("0").sum(-1).eq(1).all()


def test_only_routed_layers_go_into_output_only() -> None:
    with pytest.raises(TypeError, match=r"OutputOnly needs a routed layer, .*, got Linear"):
        OutputOnly(nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [(-0.1,), (0.0, float("nan")), (0, 0, float("inf"))], ids=str)
def test_weights_out_of_range_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="loss weights must be 0 or more, got"):
        RoutingLoss(*weights)


@pytest.mark.parametrize("given", ["record.routings", "output"])
def test_other_records_are_refused(given: str, model: Model, x: Tensor) -> None:
    with record_routings(model) as record:
        y = model(x)
    with pytest.raises(TypeError, match="needs the record of record_routings, or the routings"):
        RoutingLoss()(record.routings if given == "record.routings" else y)  # type: ignore[arg-type]


def trained(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model(recompute=False)
    run = wrap(model)
    x = torch.randn(2 * B, T, D, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(2 * B * T).view(2 * B, T) % 7 != 0
    part = slice(B * rank, B * (rank + 1))
    with run_plan(run, PLAN), record_routings(run, mask[part]) as record:
        y = run(x[part])
        loss = y.square().mean() + RoutingLoss(0.3, 0.2)(record)
        loss.backward()
    return {n: _whole(p.grad) for n, p in model.named_parameters()}  # type: ignore[arg-type]


LENGTHS = ((5, 7, 5, None), (5, 5, 7, 3))  # of each layer, by rank; one is called on one alone


def three_lengths(ranks: Sequence[int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleList(OutputOnly(MixtureOfExperts(D, n, 6)) for n in (4, 4, 4, 3))
    generator = torch.Generator().manual_seed(1)
    x = [[torch.randn(1, n or 1, D, generator=generator) for n in each] for each in LENGTHS]
    with record_routings(model) as record:
        for number, layer in enumerate(model):
            for rank in ranks:
                if LENGTHS[rank][number] is not None:
                    layer(x[rank][number])
    loss = RoutingLoss(0.3, load_balancing=0.1, router_z=0.05)(record)
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad for n, p in model.named_parameters() if "router" in n
    }  # type: ignore[dict-item]


def one_of_two(rank: int) -> dict[str, Tensor]:
    found = three_lengths([rank])
    # What DDP does to gradients; that of a layer which was not called is none, and counts as zero.
    mean = {n: (torch.zeros(3, D) if g is None else g) / 2 for n, g in found.items() if n != "loss"}
    for gradient in mean.values():
        torch.distributed.all_reduce(gradient)
    return {"loss": found["loss"], **mean}


def test_ranks_may_have_other_lengths_and_call_other_layers(tmp_path: Path) -> None:
    expected = three_lengths([0, 1])
    for found in on_two_ranks(one_of_two, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


def with_ddp(rank: int) -> dict[str, Tensor]:
    return trained(rank, DistributedDataParallel)


def with_fsdp2(rank: int) -> dict[str, Tensor]:
    return trained(rank, _sharded)


@pytest.mark.parametrize("on_rank", [with_ddp, with_fsdp2])
def test_two_ranks_train_as_one(on_rank: Callable[[int], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(2 * B, T, D, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(2 * B * T).view(2 * B, T) % 7 != 0
    with run_plan(model, PLAN), record_routings(model, mask) as record, nullcontext():
        (model(x).square().mean() + RoutingLoss(0.3, 0.2)(record)).backward()
    expected = gradients(model)
    for found in on_two_ranks(on_rank, tmp_path):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
