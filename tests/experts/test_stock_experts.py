"""Experts with the options of published models, against the modules of transformers."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2MoeConfig
from transformers.activations import ACT2FN
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from lightning_dsmoe.experts import GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.metrics import RoutedParameters, count_parameters
from lightning_dsmoe.routing import Selection, Threshold, TopK

D, E, WIDTH, SHARED = 12, 6, 10, 14


@pytest.mark.parametrize("theirs", ["gelu_new", "gelu_pytorch_tanh"])
def test_tanh_gelu_is_that_of_transformers(theirs: str) -> None:
    x = torch.linspace(-8, 8, 2001)
    ours = MLPExperts(2, 1, 2, activation="gelu_tanh")
    found = ours.activate(x)
    torch.testing.assert_close(found, ACT2FN[theirs](x), rtol=0, atol=2e-6)
    assert (found - F.gelu(x)).abs().max() > 1e-4


def qwen2_moe(*, renormalize: bool) -> Qwen2MoeSparseMoeBlock:
    config = Qwen2MoeConfig(
        hidden_size=D,
        num_experts=E,
        num_experts_per_tok=2,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        norm_topk_prob=renormalize,
    )
    block = Qwen2MoeSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def ours_of(block: Qwen2MoeSparseMoeBlock) -> MixtureOfExperts:
    swiglu = partial(GLUExperts, activation="silu")
    layer = MixtureOfExperts(
        D,
        E,
        WIDTH,
        experts=swiglu,
        d_shared=SHARED,
        shared_gate=True,
        gate_scale="sum_to_one",
    )
    shared = block.shared_expert
    layer.load_state_dict(
        {
            "router.weight": block.gate.weight,
            "experts.w_in.weight": block.experts.gate_up_proj,
            "experts.w_out.weight": block.experts.down_proj.mT,
            "shared.experts.w_in.weight": torch.cat(
                [shared.gate_proj.weight, shared.up_proj.weight]
            )[None],
            "shared.experts.w_out.weight": shared.down_proj.weight.T[None],
            "shared_gate.weight": block.shared_expert_gate.weight,
        }
    )
    return layer


def near(found: Tensor, expected: Tensor) -> None:
    bound = 3e-6 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_gate_of_the_shared_expert_is_that_of_qwen2_moe(renormalize: bool) -> None:
    block = qwen2_moe(renormalize=renormalize)
    layer, selection = ours_of(block), TopK(2, renormalize=renormalize)
    x, cotangent = torch.randn(2, 9, D, requires_grad=True), torch.randn(2, 9, D)
    expected, found = block(x), layer(x, selection).output
    near(found, expected)
    assert layer.shared_gate is not None
    own = torch.autograd.grad(found, (x, layer.shared_gate.weight), cotangent)
    other = torch.autograd.grad(expected, (x, block.shared_expert_gate.weight), cotangent)
    for gradient, theirs in zip(own, other, strict=True):
        near(gradient, theirs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("selection", [TopK(E), Threshold(0.0)], ids=str)
def test_all_experts_and_the_gate_are_the_dense_layer(selection: Selection) -> None:
    layer = ours_of(qwen2_moe(renormalize=False))
    x = torch.randn(2, 9, D)
    dense = layer(x).output
    near(layer(x, selection).output, dense)
    assert layer.shared is not None
    assert layer.shared_gate is not None
    without = copy.deepcopy(layer)
    without.shared = without.shared_gate = None
    gates = torch.sigmoid(x @ layer.shared_gate.weight.T)
    near(dense, without(x).output + gates * layer.shared(x).output)


def test_the_output_bias_of_a_gated_shared_expert_has_no_gate() -> None:
    mlp = partial(MLPExperts, bias=True)
    layer = MixtureOfExperts(D, E, WIDTH, experts=mlp, d_shared=SHARED, shared_gate=True)
    assert layer.shared is not None
    assert layer.shared_gate is not None
    x = torch.ones(1, D)
    nn.init.constant_(layer.shared_gate.weight, -1000.0)
    without = layer(x).output
    nn.init.constant_(layer.shared.experts.b_out, 3.0)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x).output, without + 3)


def test_the_gate_of_the_shared_expert_always_runs() -> None:
    layer = ours_of(qwen2_moe(renormalize=False))
    counts = count_parameters(layer)
    assert counts.layers == {"": RoutedParameters(E, 3 * WIDTH * D)}
    assert counts.always == E * D + 3 * SHARED * D + D
    assert not any(p is layer.shared_gate.weight for p in layer.parameters_by_expert())  # type: ignore[union-attr]
