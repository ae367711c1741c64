import copy
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

from lightning_dsmoe.experts import FeedForward, GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.experts import experts as experts_module
from lightning_dsmoe.routing import LinearRouter, Selection, Threshold, ThresholdTopK, TopK, TopP
from lightning_dsmoe.routing.routing import GateScale
from lightning_dsmoe.stacked import dispatch

pytestmark = pytest.mark.usefixtures("way")

SELECTIONS: list[Selection] = [
    TopK(1),
    TopK(3),
    TopK(2, renormalize=True),
    Threshold(0.9),
    ThresholdTopK(0.9),
    TopP(0.6),
]
SHARP = partial(LinearRouter, init_std=1.0)


def mixture(**options: object) -> MixtureOfExperts:
    return MixtureOfExperts(
        **{"d_model": 8, "n_experts": 5, "d_expert": 3, "router": SHARP} | options
    )


def expert_outputs(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """Output of each expert by itself, `[B, T, E, D]`."""
    each = []
    for e in range(layer.n_experts):
        gates = torch.zeros(x.shape[0] * x.shape[1], layer.n_experts)
        gates[:, e] = 1
        each.append(layer.experts(x.flatten(0, 1), gates).view_as(x))
    return torch.stack(each, dim=2)


def squares(
    layer: MixtureOfExperts, parameters: dict[str, Tensor], x: Tensor, *args: Any
) -> Tensor:
    return functional_call(layer, parameters, (x, *args)).output.square().sum()


@pytest.mark.parametrize("selection", [[], [TopK(2)], [Threshold(0.9)]], ids=str)
def test_function_transforms_give_the_gradients_of_autograd(selection: list[Selection]) -> None:
    layer, x = mixture(experts=GLUExperts, d_shared=2).double(), torch.randn(3, 4, 8).double()
    parameters = dict(layer.named_parameters())
    layer(x, *selection).output.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    gradient = grad(partial(squares, layer))
    torch.testing.assert_close(gradient(parameters, x, *selection), expected)
    each = vmap(lambda row: gradient(parameters, row, *selection))(x)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, expected)


def test_several_mixtures_run_at_once_and_have_second_derivatives() -> None:
    layers, x = [mixture(), mixture()], torch.randn(3, 8)
    stacked, _ = stack_module_state(layers)
    outputs = vmap(lambda parameters: functional_call(layers[0], parameters, (x,)).output)(stacked)
    torch.testing.assert_close(outputs, torch.stack([layer(x).output for layer in layers]))

    def slope(x: Tensor) -> Tensor:
        return grad(lambda x: layers[0](x).output.square().sum())(x).square().sum()

    step = 1e-3 * torch.randn(3, 8)
    change = slope(x + step) - slope(x - step)
    torch.testing.assert_close(2 * (grad(slope)(x) * step).sum(), change, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("gate_scale", get_args(GateScale))
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_output_is_the_gated_sum_of_experts(selection: Selection, gate_scale: GateScale) -> None:
    layer = mixture(gate_scale=gate_scale, experts=GLUExperts)
    x = torch.randn(2, 4, 8)
    output, routing = layer(x, selection)
    assert routing is not None
    factor = 5 if gate_scale == "mean_one" else 1
    gates = factor * selection(routing.probs).weight
    torch.testing.assert_close(output, (gates[..., None] * expert_outputs(layer, x)).sum(2))


@pytest.mark.parametrize("d_shared", [0, 6])
@pytest.mark.parametrize("experts", [GLUExperts, partial(MLPExperts, bias=True)])
@pytest.mark.parametrize("full", [TopK(5), Threshold(0.0)], ids=str)
def test_full_selection_equals_dense_in_values_and_gradients(
    full: Selection, experts: object, d_shared: int
) -> None:
    layer = mixture(experts=experts, d_shared=d_shared)
    x = torch.randn(3, 4, 8, requires_grad=True)
    dense, sparse = layer(x).output, layer(x, full).output
    torch.testing.assert_close(sparse, dense, rtol=0, atol=2e-6)
    wanted = [x, *layer.parameters()]
    upstream = torch.randn_like(dense)
    torch.testing.assert_close(
        torch.autograd.grad(sparse, wanted, upstream), torch.autograd.grad(dense, wanted, upstream)
    )


@pytest.mark.parametrize("renormalize", [False, True])
def test_top_one_is_the_best_expert_under_its_gate(renormalize: bool) -> None:
    layer = mixture(gate_scale="sum_to_one")
    x = torch.randn(2, 4, 8)
    output, routing = layer(x, TopK(1, renormalize=renormalize))
    assert routing is not None
    gate, best = routing.probs.max(-1)
    expected = expert_outputs(layer, x).gather(2, best[..., None, None].expand(2, 4, 1, 8))[:, :, 0]
    torch.testing.assert_close(output, expected if renormalize else gate[..., None] * expected)


def test_equal_gates_are_the_dense_layer_of_the_same_width() -> None:
    layer, dense = mixture(router=partial(LinearRouter, init_std=0.0)), FeedForward(8, 15)
    with torch.no_grad():
        dense.experts.w_in.weight.copy_(layer.experts.w_in.weight.view(1, 15, 8))
        dense.experts.w_out.weight.copy_(layer.experts.w_out.weight.view(1, 15, 8))
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(layer(x).output, dense(x).output)
    assert dense(x, TopK(1)).routing is None


def test_every_expert_learns_from_every_token() -> None:
    layer = mixture(d_shared=4)
    layer(torch.randn(1, 1, 8)).output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name


@pytest.mark.parametrize("selection", [None, *SELECTIONS], ids=str)
def test_order_of_experts_does_not_matter(selection: Selection | None) -> None:
    layer = mixture()
    shuffled, order = copy.deepcopy(layer), torch.randperm(5)
    assert isinstance(shuffled.router, LinearRouter)
    for weight in (
        shuffled.router.weight,
        shuffled.experts.w_in.weight,
        shuffled.experts.w_out.weight,
    ):
        weight.data = weight.data[order]
    x = torch.randn(2, 4, 8)
    options = () if selection is None else (selection,)
    torch.testing.assert_close(shuffled(x, *options).output, layer(x, *options).output)


def test_dropping_experts_errs_at_most_by_their_gated_outputs() -> None:
    layer, x = mixture(), torch.randn(10, 100, 8)
    output, routing = layer(x, Threshold(0.8))
    assert routing is not None
    gates, active = Threshold(0.8)(routing.probs)
    dropped = 5 * (routing.probs - gates)
    bound = (dropped * expert_outputs(layer, x).norm(dim=-1)).sum(-1)
    error = (layer(x).output - output).norm(dim=-1)
    assert (error <= bound + 1e-5).all()
    assert error.max() > 0.1 * bound.max() > 0
    assert not active.all()


def test_work_is_that_of_the_experts_that_are_computed(way: str) -> None:
    layer, x = MixtureOfExperts(16, 4, 8), torch.randn(2, 5, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x, TopK(1))
    router, expert = 2 * 16 * 4, 2 * 2 * 16 * 8
    running = 1 if way == "sorted" else 4
    assert counter.get_total_flops() == 10 * (router + running * expert)


def test_the_work_of_one_expert_decides_how_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = MixtureOfExperts(16, 4, 8, experts=GLUExperts), torch.randn(2, 5, 16)
    per_kernel = 10 * 3 * 16 * 8 / experts_module._KERNELS_PER_EXPERT
    found = []
    for cost in (per_kernel - 0.1, per_kernel + 0.1):
        monkeypatch.setitem(dispatch.MULTIPLICATIONS_PER_KERNEL, "cpu", cost)
        with FlopCounterMode(display=False) as counter:
            layer(x, TopK(1))
        found.append(counter.get_total_flops())
    assert found[1] - found[0] == 3 * 10 * 2 * 3 * 16 * 8


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        kept = layer(x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    del kept
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


@pytest.mark.parametrize("experts", [MLPExperts, GLUExperts])
def test_training_keeps_no_more_than_a_plain_layer(experts: type[MLPExperts]) -> None:
    x = torch.randn(4, 32, 64)
    plain = saved_bytes(FeedForward(64, 4 * 64, experts=experts), x)
    routed = saved_bytes(MixtureOfExperts(64, 4, 64, experts=experts), x)
    assert routed <= 1.05 * plain


def test_no_tokens_and_ten_thousand_experts() -> None:
    layer = MixtureOfExperts(4, 10_000, 4)
    assert layer(torch.randn(0, 3, 4)).output.shape == (0, 3, 4)
    assert layer(torch.randn(0, 3, 4), TopK(2)).output.shape == (0, 3, 4)
    x, selection = torch.randn(2, 1, 4), TopK(3)
    output, routing = layer(x, selection)
    assert routing is not None
    gates = 10_000 * selection(routing.probs).weight
    torch.testing.assert_close(output, layer.experts(x[:, 0], gates[:, 0])[:, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_scale": "half"}, "gate_scale must be one of .*, got 'half'"),
        ({"d_shared": -1}, "d_shared must be 0 or more, got -1"),
        ({"shared_gate": True}, "shared_gate needs a shared expert, got d_shared=0"),
        ({"n_experts": 0}, "n_experts >= 1, got 8 and 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(**options)


@pytest.mark.parametrize("k", [6, 100])
def test_more_experts_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"TopK\(k={k}\) needs k <= 5"):
        mixture()(torch.randn(1, 1, 8), TopK(k))
