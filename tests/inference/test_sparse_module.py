"""Models that are not the library's, compiled, against themselves under an open plan."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference import SparseModel, SparseModule, SwitchPoints, compile_sparse
from lightning_dsmoe.inference.engine.layers.packed_layers import packed_layers
from lightning_dsmoe.metrics import count_parameters
from lightning_dsmoe.routing import (
    AllExperts,
    LinearRouter,
    OutputOnly,
    Selection,
    SelectionPlan,
    TopK,
    record_routings,
    routed_layers,
    run_plan,
)

from .conftest import FEED_FORWARD, UNCOMPILED, assert_near, rotary_glu
from .networks import SELECTIONS, Halved, Network, network, plan_of

MASKED = SwitchPoints(gather_up_to=0, grouped_from=10**9)
SHAPES = [(1, 1), (2, 3), (3, 40)]


@pytest.fixture
def net() -> Network:
    return network()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 6)


@torch.no_grad()
def under(model: nn.Module, plan: SelectionPlan, *args: Tensor) -> Tensor:
    with run_plan(model, plan):
        y: Tensor = model(*args)
    return y


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("points", [UNCOMPILED, MASKED], ids=["grouped", "masked"])
def test_the_result_is_that_of_the_model_under_the_plan(
    points: SwitchPoints, selection: Selection, net: Network
) -> None:
    sparse = compile_sparse(net, plan_of(selection), switch_points=points)
    for shape in SHAPES:
        x = torch.randn(*shape, 6)
        assert_near(sparse(x), under(net, plan_of(selection), x))


def test_all_experts_are_the_dense_model(net: Network, x: Tensor) -> None:
    sparse = compile_sparse(net, SelectionPlan(), switch_points=UNCOMPILED)
    assert_near(sparse(x), net(x).detach())


@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_attention_in_both_directions(causal: bool, x: Tensor) -> None:
    net, mask = network(causal=causal), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    sparse = compile_sparse(net, plan_of(TopK(2)), switch_points=UNCOMPILED)
    expected = under(net, plan_of(TopK(2)), x, mask)
    assert_near(sparse(x, mask)[mask], expected[mask])
    assert not torch.allclose(expected[1, 4:], under(net, plan_of(TopK(2)), x)[1, 4:])


def test_the_trained_model_is_not_changed(net: Network, x: Tensor) -> None:
    net.train()
    before, expected = copy.deepcopy(net.state_dict()), net(x)
    sparse = compile_sparse(net, plan_of(TopK(1)), switch_points=UNCOMPILED)
    assert net.training
    assert not sparse.training
    assert torch.equal(net(x), expected)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in sparse.parameters())


def test_a_layer_with_a_forward_of_its_own_keeps_it(net: Network) -> None:
    sparse = compile_sparse(net, plan_of(TopK(1)), switch_points=UNCOMPILED)
    assert type(sparse.model.own) is Halved
    assert len(packed_layers(sparse)) == len(routed_layers(net)) - 1
    x = torch.randn(5, 24)
    assert torch.equal(sparse.model.own(x).output, net.own(x, TopK(1)).output)


def test_another_selection_holds_over_the_plan(net: Network, x: Tensor) -> None:
    sparse = compile_sparse(net, plan_of(TopK(1)), switch_points=UNCOMPILED)
    for other in (plan_of(TopK(2)), SelectionPlan()):
        assert_near(under(sparse, other, x), under(net, other, x))
    tokens = torch.randn(5, 24)
    # The default of a call, all experts, gives way to the plan.
    planned = plan_of(TopK(1)).selections(routed_layers(net))["paper"]
    for selection, runs in ((TopK(3), TopK(3)), (AllExperts(), planned)):
        assert_near(
            sparse.model.paper(tokens, selection).output,
            net.paper(tokens, runs).output.detach(),
        )


def test_a_model_that_chooses_itself() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FEED_FORWARD(8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x, selection=TopK(2)).output
            return y

    model, x = Choosing().eval(), torch.randn(5, 8)
    sparse = compile_sparse(model, SelectionPlan(experts=TopK(1)), switch_points=UNCOMPILED)
    assert_near(sparse(x), model(x).detach())


def test_routings_are_recorded_under_the_plan(net: Network, x: Tensor) -> None:
    plan = plan_of(TopK(1))
    sparse = compile_sparse(net, plan, switch_points=UNCOMPILED)
    with record_routings(sparse) as found, torch.no_grad():
        y = sparse(x)
    with record_routings(net) as expected:
        assert_near(y, under(net, plan, x))
    assert [f"model.{name}" for name in expected.routings] == list(found.routings)
    for name, active in expected.active_masks().items():
        assert torch.equal(found.active(f"model.{name}"), active)
        assert_near(found.routings[f"model.{name}"].probs, expected.routings[name].probs)


def test_decoders_inside_another_model_run_the_plan() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.other = rotary_glu(), rotary_glu()

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.decoder(tokens).logits + self.other(tokens).logits
            return y

    model, plan = Two(), SelectionPlan(TopK(1), TopK(1))
    tokens = torch.randint(29, (2, 7))
    sparse = compile_sparse(model, plan, switch_points=UNCOMPILED)
    assert isinstance(sparse, SparseModule)
    assert_near(sparse(tokens), under(model, plan, tokens))


def test_a_module_with_only_a_decoder_generates() -> None:
    class One(nn.Module):
        def __init__(self, decoder: Decoder) -> None:
            super().__init__()
            self.decoder = decoder

    assert isinstance(compile_sparse(One(rotary_glu()), SelectionPlan()), SparseModel)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_copies_and_states(
    quantization: str | None, net: Network, x: Tensor, tmp_path: Path
) -> None:
    options = {"quantization": quantization, "switch_points": UNCOMPILED}
    sparse = compile_sparse(net, plan_of(TopK(2)), **options)
    y = sparse(x)
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(copied(x), y)
        assert copied.plan == sparse.plan
        assert copied.model.tied.weight is copied.model.out.weight
    others = [compile_sparse(network(), plan_of(TopK(2)), **options) for _ in range(2)]
    assert not torch.equal(others[0](x), y)
    others[0].load_state_dict(sparse.state_dict())
    save_model(sparse, str(tmp_path / "weights"))
    load_model(others[1], str(tmp_path / "weights"))
    for other in others:
        assert torch.equal(other(x), y)


def test_experts_in_8_bits(net: Network, x: Tensor) -> None:
    sparse = compile_sparse(net, plan_of(TopK(2)), quantization="int8", switch_points=UNCOMPILED)
    exact = under(net, plan_of(TopK(2)), x)
    error = (sparse(x) - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.05
    report = sparse.report()
    assert len(report.quantized) == 2 * (len(routed_layers(net)) - 1)
    assert report.n_bytes < compile_sparse(net, plan_of(TopK(2))).report().n_bytes


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_bfloat16(quantization: str | None, net: Network, x: Tensor) -> None:
    plan = plan_of(AllExperts())
    sparse = compile_sparse(net, plan, quantization=quantization, switch_points=UNCOMPILED)
    y = sparse.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    exact = under(net, plan, x)
    assert ((y - exact).norm() / exact.norm()).item() < 0.05


def test_autocast_does_not_reach_packed_layers(net: Network) -> None:
    sparse = compile_sparse(net, SelectionPlan(experts=TopK(2)), switch_points=UNCOMPILED)
    x = torch.randn(5, 24)
    exact = net.paper(x, TopK(2)).output.detach()
    with torch.autocast("cpu", torch.bfloat16):
        whole, half = sparse.model.paper(x).output, sparse.model.paper(x.bfloat16()).output
    assert_near(whole, exact)
    assert half.dtype == torch.bfloat16
    assert_near(half.float(), exact, 0.02)


@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function:DeprecationWarning")
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_torch_compile_makes_one_graph(shape: tuple[int, ...], net: Network) -> None:
    for selection in (TopK(2), AllExperts()):
        sparse = compile_sparse(net, plan_of(selection))
        x = torch.randn(*shape, 6)
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        assert_near(compiled(x), under(net, plan_of(selection), x))


def test_hooks_and_references_of_the_model_stay() -> None:
    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FEED_FORWARD(8)
            self.also = [self.layer]
            self.layer.register_forward_hook(double)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.also[0](x).output
            return y

    model, x = Listing().eval(), torch.randn(5, 8)
    plan = SelectionPlan(experts=TopK(1))
    sparse = compile_sparse(model, plan, switch_points=UNCOMPILED)
    assert_near(sparse(x), under(model, plan, x))
    assert sparse.model.also[0] is sparse.model.layer


def double(layer: nn.Module, args: object, output: object) -> object:
    return output._replace(output=2 * output.output)  # type: ignore[attr-defined]


def test_no_tokens(net: Network) -> None:
    sparse = compile_sparse(net, plan_of(TopK(1)), switch_points=UNCOMPILED)
    assert sparse.model.paper(torch.randn(0, 24)).output.shape == (0, 24)
    assert sparse.model.paper(torch.randn(24)).output.shape == (24,)


def test_mistakes(net: Network) -> None:
    plan = plan_of(TopK(1))
    sparse = compile_sparse(net, plan, switch_points=UNCOMPILED)
    compiled = nn.Sequential(torch.compile(nn.Sequential(FEED_FORWARD(8))))
    for model, words in [
        (nn.Linear(2, 2), "this Linear has none"),
        (sparse, "this SparseModule is a sparse one already"),
        (sparse.model, "this Network is a sparse one already"),
        (compiled, "this one was by torch.compile"),
        (DataParallel(net), "the model inside a DataParallel"),
    ]:
        with pytest.raises(ValueError, match=words):
            compile_sparse(model, SelectionPlan())
    with pytest.raises(ValueError, match=r"'nowhere'; the nearest names are"):
        compile_sparse(net, SelectionPlan(layers={"nowhere": TopK(1)}))
    with pytest.raises(ValueError, match=r"paper: TopK\(k=9\) needs k <= 5"):
        compile_sparse(net, SelectionPlan(layers={"paper": TopK(9)}))
    with pytest.raises(ValueError, match="context_length: for a Decoder only, got a Network"):
        compile_sparse(net, plan, context_length=3)
    with pytest.raises(ValueError, match="switch points must be 0 or more"):
        compile_sparse(net, plan, switch_points=SwitchPoints(gather_up_to=-1))
    with pytest.raises(TypeError, match="a plan holds"):
        compile_sparse(net, TopK(1))
    with pytest.raises(AttributeError):
        sparse.plan = plan
    with pytest.raises(RuntimeError, match="a sparse model has no gradients"):
        sparse.model.paper(torch.randn(5, 24, requires_grad=True))
    with pytest.raises(ValueError, match=r"needs k <= 5"):
        compile_sparse(net, plan).model.paper(torch.randn(1, 24), TopK(9))
    with pytest.raises(TypeError, match="a selection chooses experts"):
        sparse.model.paper(torch.randn(1, 24), 2)


def test_an_output_only_layer_in_a_sequence() -> None:
    layer = partial(MixtureOfExperts, n_experts=4, d_expert=6)
    model = nn.Sequential(nn.Linear(3, 8), OutputOnly(layer(8)), nn.Linear(8, 2)).eval()
    plan, x = SelectionPlan(experts=TopK(1)), torch.randn(4, 7, 3)
    sparse = compile_sparse(model, plan, switch_points=UNCOMPILED)
    assert_near(sparse(x), under(model, plan, x))


class Forwarding(nn.Module):
    """Hands on the selection that it is given, by default that of all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = MixtureOfExperts(16, 4, 8, router=partial(LinearRouter, init_std=1.0))

    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> Tensor:
        return self.experts(x, selection).output


@torch.no_grad()
def test_all_experts_that_a_model_hands_on_by_default_are_no_wish() -> None:
    model, plan, x = Forwarding(), SelectionPlan(TopK(1)), torch.randn(20, 16)
    sparse = compile_sparse(model, plan)
    with run_plan(model, plan):
        assert_near(sparse(x), model(x))
    assert_near(sparse(x, TopK(2)), model(x, TopK(2)))
    with run_plan(sparse, SelectionPlan()):
        assert_near(sparse(x), model(x))


class Headed(nn.Module):
    """A decoder of this library is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        experts = partial(MixtureOfExperts, n_experts=4, d_expert=8)
        heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=8)
        self.decoder = Decoder(50, 16, 1, attention=heads, feed_forward=experts)
        self.classes = nn.Linear(50, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        classes: Tensor = self.classes(self.decoder(tokens).logits.mean(1))
        return classes


@torch.no_grad()
def test_what_is_beside_a_decoder_is_not_lost() -> None:
    model, tokens = Headed(), torch.randint(50, (4, 10))
    sparse = compile_sparse(model, SelectionPlan())
    assert isinstance(sparse, SparseModule)
    assert_near(sparse(tokens), model(tokens))


def test_options_after_compiling() -> None:
    sparse = compile_sparse(Forwarding(), SelectionPlan(TopK(1)))
    sparse.switch_points = SwitchPoints(gather_up_to=0)
    assert sparse.model.experts.few_tokens.switch_points.gather_up_to == 0
    assert not nn.ModuleList([sparse]).train()[0].model.experts.training
    counts = count_parameters(sparse)
    assert counts._replace(layers={}) == count_parameters(Forwarding())._replace(layers={})
