"""Layers on one new token of each sequence, against loops over experts, heads and tokens."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.attention.rotary import rotate, rotation
from lightning_dsmoe.experts import Experts, GLUExperts, MLPExperts
from lightning_dsmoe.inference.engine.decode.expert_choice import ChosenExperts
from lightning_dsmoe.inference.engine.decode.gathered_layers import (
    LayerSlots,
    gather_experts,
    gather_heads,
)
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights

from ....pairwise import pairwise
from ..conftest import assert_near

CHOSEN = [None, [3], [0, 2, 4], [4, 4], [4, 1]]


def drawn(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)


def choice_of(chosen: list[int] | None, n_tokens: int) -> ChosenExperts:
    gates = torch.rand(5 if chosen is None else len(chosen), n_tokens)
    gates[0, -1] = 0
    return ChosenExperts(None if chosen is None else torch.tensor(chosen), gates)


def one_expert(experts: Experts, e: int, x_D: Tensor) -> Tensor:
    """Its output without the bias that all share, in double precision."""
    z = experts.w_in.weight[e].double() @ x_D.double()
    z = z if experts.b_in is None else z + experts.b_in[e].double()
    if isinstance(experts, GLUExperts):
        hidden = F.silu(z[: len(z) // 2]) * z[len(z) // 2 :]
    else:
        hidden = F.gelu(z)
    return hidden @ experts.w_out.weight[e].double()


@pytest.mark.parametrize(
    ("make", "chosen", "n_tokens"),
    pairwise(
        make=[
            partial(MLPExperts, d_expert=20, bias=True),
            partial(MLPExperts, d_expert=70),
            partial(GLUExperts, d_expert=34, activation="silu"),
            partial(GLUExperts, d_expert=7, activation="silu", bias=True),
        ],
        chosen=CHOSEN,
        n_tokens=[1, 2, 3],
    ),
)
@torch.no_grad()
def test_experts(
    make: Callable[[int, int], Experts], chosen: list[int] | None, n_tokens: int
) -> None:
    experts = make(72, 5)
    drawn(experts)
    x_BD, choice = torch.randn(n_tokens, 72), choice_of(chosen, n_tokens)
    expected = torch.stack(
        [
            sum(
                gate.double() * one_expert(experts, e, x_D)
                for e, gate in zip(chosen or range(5), gates_K, strict=True)
            )
            for x_D, gates_K in zip(x_BD, choice.gates_KB.T, strict=True)
        ]
    )
    if experts.b_out is not None:
        expected += experts.b_out.double()
    experts.w_in = RowMajorWeights(experts.w_in.weight, transposed=False)
    experts.w_out = RowMajorWeights(experts.w_out.weight.mT, transposed=True)
    assert_near(gather_experts(experts, x_BD, choice), expected.float(), 1e-6)


@pytest.mark.parametrize(
    ("options", "chosen", "n_tokens"),
    pairwise(
        options=[
            {},
            {"bias": True},
            {"qk_norm": True},
            {"rope_theta": None, "bias": True, "qk_norm": True},
        ],
        chosen=CHOSEN,
        n_tokens=[1, 2, 3],
    ),
)
@torch.no_grad()
def test_heads(options: dict[str, object], chosen: list[int] | None, n_tokens: int) -> None:
    heads = HeadGroups(24, 5, 2, 6, **options)
    drawn(heads)
    x_BD, choice = torch.randn(n_tokens, 24), choice_of(chosen, n_tokens)
    keys, values = torch.randn(2, 11, n_tokens, 2, 6)
    seen_SB = torch.rand(11, n_tokens) < 0.5
    at, positions = 4, torch.arange(n_tokens) + 3
    seen_SB[at] = True
    by = None if heads.rotary is None else rotation(positions[:, None], *heads.rotary)

    def placed(channels: Tensor, t: int) -> Tensor:
        return channels if by is None else rotate(channels, rotation(positions[t], 6, 10000.0))

    new_keys, new_values = heads.kv(x_BD).view(n_tokens, 2, 2, 6).unbind(1)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = torch.zeros(n_tokens, 24, dtype=torch.double)
    for t, x_D in enumerate(x_BD):
        expected_values[at, t] = new_values[t]
        for h in range(2):
            expected_keys[at, t, h] = placed(heads.k_norm(new_keys[t, h]), t)
        for e, gate in zip(chosen or range(5), choice.gates_KB[:, t], strict=True):
            q_R = heads.w_q.weight[e] @ x_D
            q_R = q_R if heads.b_q is None else q_R + heads.b_q[e]
            for h in range(2):
                q_C = placed(heads.q_norm(q_R.view(2, 6)[h]), t).double()
                mine = seen_SB[:, t]
                scores = expected_keys[mine, t, h].double() @ q_C / 6**0.5
                attended = scores.softmax(0) @ expected_values[mine, t, h].double()
                w_o = heads.w_o.weight[e].view(2, 6, 24)[h].double()
                expected[t] += gate.double() * (attended @ w_o)
        if heads.b_o is not None:
            expected[t] += heads.b_o.double()

    keys[~seen_SB] = 1e30  # would be noticed, if anyone looked
    heads.w_q = RowMajorWeights(heads.w_q.weight, transposed=False)
    heads.w_o = RowMajorWeights(heads.w_o.weight.mT, transposed=True)
    slots = LayerSlots(keys, values, seen_SB, torch.tensor([at]))
    assert_near(gather_heads(heads, x_BD, choice, by, slots), expected.float(), 3e-6)
    assert_near(keys[seen_SB], expected_keys[seen_SB])
    assert (keys[~seen_SB] == 1e30).all()
    others = torch.arange(11) != at
    assert torch.equal(values[others], expected_values[others])
    assert_near(values[at], expected_values[at])


def test_large_scores_stay_finite() -> None:
    heads = HeadGroups(8, 1, 1, 4, rope_theta=None)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.fill_(1.0)
    heads.w_q = RowMajorWeights(heads.w_q.weight.detach(), transposed=False)
    heads.w_o = RowMajorWeights(heads.w_o.weight.detach().mT, transposed=True)
    keys = torch.zeros(3, 1, 1, 4)
    seen = torch.tensor([[True], [True], [False]])
    slots = LayerSlots(keys, torch.zeros_like(keys), seen, torch.tensor([1]))
    x_BD = torch.full((1, 8), 100.0)
    with torch.no_grad():
        y = gather_heads(heads, x_BD, ChosenExperts(None, torch.ones(1, 1)), None, slots)
    assert torch.equal(y, torch.full((1, 8), 3200.0))  # its own value, 4 times 800
