import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from lightning_dsmoe.attention import (
    GroupedQueryAttention,
    KVCache,
    MixtureOfAttentionHeads,
    head_groups,
)
from lightning_dsmoe.routing import LinearRouter, Selection, Threshold, ThresholdTopK, TopK, TopP
from lightning_dsmoe.stacked import dispatch

pytestmark = pytest.mark.usefixtures("way")

SELECTIONS: list[Selection] = [
    TopK(1),
    TopK(2, renormalize=True),
    Threshold(0.9),
    ThresholdTopK(0.9),
    TopP(0.6),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_heads": 1, "rope_theta": None, "gate_scale": "sum_to_one"},
    {"qk_norm": True, "bias": True},
]
OPTION_IDS = ["default", "paper", "qk norm and biases"]
LEFT_PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()


def mixture(**options: Any) -> MixtureOfAttentionHeads:
    layer = MixtureOfAttentionHeads(
        **{"d_model": 8, "n_experts": 3, "n_heads": 2, "d_head": 4}
        | {"router": partial(LinearRouter, init_std=1.0)}
        | options
    )
    for bias in (layer.heads.b_q, layer.heads.b_o, layer.heads.kv.bias):
        if bias is not None:
            torch.nn.init.normal_(bias)
    return layer


def plain_of(layer: MixtureOfAttentionHeads, expert: int) -> GroupedQueryAttention:
    """The heads of one expert as an attention layer without an output bias."""
    plain = GroupedQueryAttention(
        layer.d_model,
        layer.n_heads,
        layer.n_heads,
        layer.d_head,
        rope_theta=layer.rope_theta,
        qk_norm=layer.qk_norm,
        bias=layer.bias,
    )
    weights = layer.heads.state_dict()
    for name in ("w_q.weight", "w_o.weight", "b_q"):
        if name in weights:
            weights[name] = weights[name][expert, None]
    if "b_o" in weights:
        weights["b_o"] = torch.zeros(layer.d_model)
    plain.heads.load_state_dict(weights)
    return plain


def gated_sum(
    layer: MixtureOfAttentionHeads, x: Tensor, gates: Tensor, mask: Tensor | None
) -> Tensor:
    each = [plain_of(layer, e)(x, mask=mask).output for e in range(layer.n_experts)]
    y = (layer.gate_factor * gates[..., None] * torch.stack(each, dim=2)).sum(2)
    return y if layer.heads.b_o is None else y + layer.heads.b_o


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("selection", [None, *SELECTIONS], ids=str)
def test_output_is_the_gated_sum_of_plain_attentions(
    selection: Selection | None, options: dict[str, Any], mask: Tensor | None
) -> None:
    layer, x = mixture(**options), torch.randn(3, 5, 8)
    output, routing = layer(x, *([selection] if selection else []), mask=mask)
    assert routing is not None
    gates = selection(routing.probs).weight if selection else routing.probs
    torch.testing.assert_close(output, gated_sum(layer, x, gates, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("full", [TopK(3), Threshold(0.0)], ids=str)
def test_full_selection_equals_dense_in_values_and_gradients(
    full: Selection, options: dict[str, Any], mask: Tensor | None
) -> None:
    layer, x = mixture(**options), torch.randn(3, 5, 8, requires_grad=True)
    dense, sparse = layer(x, mask=mask).output, layer(x, full, mask=mask).output
    torch.testing.assert_close(sparse, dense, rtol=0, atol=2e-6)
    wanted = [x, *layer.parameters()]
    upstream = torch.randn_like(dense)
    torch.testing.assert_close(
        torch.autograd.grad(sparse, wanted, upstream),
        torch.autograd.grad(dense, wanted, upstream),
        atol=2e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("selection", [None, *SELECTIONS[:3]], ids=str)
def test_chunks_through_a_cache_equal_one_pass(
    selection: Selection | None, options: dict[str, Any]
) -> None:
    layer, x = mixture(**options), torch.randn(3, 5, 8)
    chosen = [selection] if selection else []
    whole = layer(x, *chosen, mask=LEFT_PADDED).output
    cache = KVCache(3, layer.n_kv_heads, 7, layer.d_head)
    parts = [
        layer(x[:, at], *chosen, mask=LEFT_PADDED[:, at], cache=cache).output
        for at in (slice(0, 3), slice(3, 4), slice(4, 5))
    ]
    torch.testing.assert_close(
        torch.cat(parts, 1)[LEFT_PADDED], whole[LEFT_PADDED], rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's attention
@pytest.mark.parametrize("selection", [[], [TopK(2)]], ids=str)
def test_gradients_of_single_samples_add_up_to_those_of_autograd(
    selection: list[Selection],
) -> None:
    layer, x = mixture(qk_norm=True, bias=True), torch.randn(3, 5, 8)
    layer(x, *selection, mask=LEFT_PADDED).output.square().sum().backward()
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        arguments = (x[None], *selection)
        output = functional_call(layer, parameters, arguments, {"mask": mask[None]}).output
        return output.square().sum()

    each = vmap(grad(loss), (None, 0, 0))(parameters, x, LEFT_PADDED)
    for name, parameter in parameters.items():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


def test_cache_does_not_depend_on_the_experts_that_run() -> None:
    layer, x = mixture(), torch.randn(2, 5, 8)
    caches = [KVCache(2, 2, 5, 4) for _ in range(2)]
    for cache, selection in zip(caches, (TopK(1), TopK(3)), strict=True):
        layer(x, selection, cache=cache)
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)
    assert caches[0].keys.abs().sum() > 0


def test_equal_gates_are_plain_grouped_query_attention() -> None:
    layer = mixture(router=partial(LinearRouter, init_std=0.0))
    plain = GroupedQueryAttention(8, 6, 2, 4)
    plain.heads.load_state_dict(layer.heads.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x).output, plain(x).output)


@pytest.mark.parametrize("way", ["sorted"], indirect=True)
def test_experts_that_nobody_picked_are_never_read() -> None:
    layer, x = mixture(bias=True), torch.randn(2, 5, 8)
    with torch.no_grad():
        layer.router.get_parameter("weight")[2] = 0
        layer.router.get_parameter("weight")[0] = x.sum((0, 1))
        for parameter in (layer.heads.w_q.weight, layer.heads.w_o.weight, layer.heads.b_q):
            assert parameter is not None
            parameter[2] = float("nan")
    x = x.sum((0, 1), keepdim=True).expand(2, 5, 8)
    assert layer(x, TopK(1)).output.isfinite().all()
    assert layer(x).output.isnan().all()


def test_every_expert_learns() -> None:
    layer = mixture(qk_norm=True, bias=True)
    layer(torch.randn(2, 5, 8)).output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad).any(), name
    assert layer.heads.w_q.weight.grad is not None
    assert layer.heads.w_q.weight.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("selection", [None, *SELECTIONS], ids=str)
def test_order_of_experts_does_not_matter(selection: Selection | None) -> None:
    layer = mixture()
    shuffled, order = copy.deepcopy(layer), torch.randperm(3)
    for weight in (
        shuffled.router.get_parameter("weight"),
        shuffled.heads.w_q.weight,
        shuffled.heads.w_o.weight,
    ):
        weight.data = weight.data[order]
    x, chosen = torch.randn(2, 5, 8), [selection] if selection else []
    torch.testing.assert_close(shuffled(x, *chosen).output, layer(x, *chosen).output)


def test_projections_work_for_the_experts_that_are_computed(way: str) -> None:
    layer, x = mixture(), torch.randn(2, 5, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x, TopK(1))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    router, keys_and_values, one_expert = 2 * 8 * 3, 2 * 8 * 16, 2 * 2 * 8 * 8
    running = 1 if way == "sorted" else 3
    assert products == 10 * (router + keys_and_values + running * one_expert)


def test_the_work_of_one_expert_decides_how_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = mixture(), torch.randn(2, 5, 8)
    per_kernel = 10 * 2 * 8 * 8 / head_groups._KERNELS_PER_GROUP
    found = []
    for cost in (per_kernel - 0.1, per_kernel + 0.1):
        monkeypatch.setitem(dispatch.MULTIPLICATIONS_PER_KERNEL, "cpu", cost)
        with FlopCounterMode(display=False) as counter:
            layer(x, TopK(1))
        found.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    assert found[1] - found[0] == 2 * 10 * 2 * 2 * 8 * 8


@pytest.mark.parametrize("selection", [None, TopK(2), Threshold(0.5)], ids=str)
def test_no_tokens(selection: Selection | None) -> None:
    chosen = [selection] if selection else []
    assert mixture()(torch.randn(0, 5, 8), *chosen).output.shape == (0, 5, 8)
    assert mixture()(torch.randn(2, 0, 8), *chosen).output.shape == (2, 0, 8)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_scale must be one of .*, got 'one'"):
        mixture(gate_scale="one")
    with pytest.raises(ValueError, match="n_experts >= 1, got 8 and 0"):
        mixture(n_experts=0)
    with pytest.raises(ValueError, match="3 groups of 0 heads"):
        mixture(n_heads=0)
