"""Loops over tokens, experts and heads in double precision, and layers to try them on."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention import KVCache
from lightning_dsmoe.attention.attention import Scope, attention_scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts, GLUExperts, MLPExperts
from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
    quantize_int8,
)

from ..conftest import assert_near

EXPERTS = [
    partial(MLPExperts, bias=True),
    partial(GLUExperts, activation="silu"),
    partial(GLUExperts, activation="relu", bias=True),
]
HEADS: list[Callable[..., HeadGroups]] = [
    HeadGroups,
    partial(HeadGroups, qk_norm=True, bias=True),
    partial(HeadGroups, rope_theta=None, bias=True),
]
WEIGHTS = ["float32", "int8"]
# Tokens that are new, those before them in the cache, and the first of each sequence.
CONTEXTS = {
    "causal": (5, 0, [0, 0]),
    "one token": (1, 0, [0, 0]),
    "padded": (5, 0, [0, 3]),
    "cached": (4, 3, [0, 0]),
    "padded and cached": (4, 3, [2, 5]),
    "one token after others": (1, 6, [0, 4]),
    "one sequence": (6, 2, [1]),
}


def drawn(layer: nn.Module, weights: str) -> None:
    """Draw all parameters and store the weights of the experts as rows."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    into, out = ("w_in", "w_out") if isinstance(layer, Experts) else ("w_q", "w_o")
    for name, transposed in ((into, False), (out, True)):
        weight = getattr(layer, name).weight
        rows = RowMajorWeights(weight.mT if transposed else weight, transposed=transposed)
        setattr(layer, name, quantize_int8(rows) if weights == "int8" else rows)


def assert_adds(add: Callable[[Tensor], None], sums_ND: Tensor, relative: float = 1e-6) -> None:
    """The sums go into the rows of a residual stream that are given, and nowhere else."""
    sums_ND = F.pad(sums_ND, (0, 0, 1, 1))
    stream = torch.randn(sums_ND.shape)
    before, idle = stream.clone(), (sums_ND == 0).all(1)
    add(stream[1:-1])
    assert torch.equal(stream[idle], before[idle])
    assert_near(stream, (before + sums_ND).float(), relative)


def exact(rows: nn.Module) -> Tensor:
    """RowMajorWeights `[E, R, C]` in double precision."""
    if isinstance(rows, Int8RowMajorWeights):
        return rows.weight.double() * rows.scales.double()[..., None] / 127
    assert isinstance(rows, RowMajorWeights)
    return rows.weight.double()


def loop_over_experts(experts: Experts, x_ND: Tensor, gates_NE: Tensor) -> Tensor:
    """Sums over the experts whose gates are not zero, in double precision."""
    w_in, w_out = exact(experts.w_in), exact(experts.w_out)
    sums = torch.zeros(x_ND.shape, dtype=torch.double)
    for x, e in gates_NE.nonzero().tolist():
        z = w_in[e] @ x_ND[x].double()
        z = z if experts.b_in is None else z + experts.b_in[e].double()
        hidden = getattr(F, experts.activation)(z[: experts.d_expert])
        if isinstance(experts, GLUExperts):
            hidden = hidden * z[experts.d_expert :]
        sums[x] += gates_NE[x, e].double() * (w_out[e] @ hidden)
    return sums if experts.b_out is None else sums + experts.b_out.double()


class Context(NamedTuple):
    """New tokens, and all tokens `[B, S, D]` of which they are the last."""

    x_BTD: Tensor
    x_BSD: Tensor
    firsts: list[int]
    scope: Scope
    keys: Tensor
    values: Tensor

    @property
    def attended(self) -> tuple[Tensor, Scope, Tensor, Tensor]:
        """Arguments of the layers after the heads."""
        return self.x_BTD, self.scope, self.keys, self.values


def read(heads: HeadGroups, context: str) -> Context:
    """Read tokens, those before the new ones into a cache."""
    n_new, n_cached, firsts = CONTEXTS[context]
    x_BSD = torch.randn(len(firsts), n_cached + n_new, 24)
    mask = torch.arange(n_cached + n_new) >= torch.tensor(firsts)[:, None] if any(firsts) else None
    cache = KVCache(len(firsts), heads.n_heads, 9, heads.d_head) if n_cached else None
    for part in (slice(n_cached), slice(n_cached, None)):
        x_BTD, some = x_BSD[:, part], None if mask is None else mask[:, part]
        scope = attention_scope(x_BTD, some, cache)
        keys, values = heads.keys_and_values(x_BTD, scope, cache, some)
    return Context(x_BTD, x_BSD, firsts, scope, keys, values)


def placed(heads: HeadGroups, norm: nn.Module, channels_C: Tensor, position: int) -> Tensor:
    if isinstance(norm, nn.RMSNorm):
        mean = channels_C.square().mean() + torch.finfo(torch.float32).eps
        channels_C = channels_C / mean.sqrt() * norm.weight.double()
    if heads.rotary is None:
        return channels_C
    half = heads.d_head // 2
    angles = position * heads.rotary.theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(*channels_C.split(half)) * torch.polar(torch.ones(half).double(), angles)
    return torch.cat([turned.real, turned.imag])


def attended(heads: HeadGroups, context: Context, b: int, t: int, q_HC: Tensor) -> Tensor:
    """What the queries of one group find for a new token, in double precision."""
    at, first = context.x_BSD.shape[1] - context.x_BTD.shape[1] + t, context.firsts[b]
    seen = range(first, at + 1) if at >= first else [at]
    outputs = []
    for h in range(heads.n_heads):
        query = placed(heads, heads.q_norm, q_HC[h], max(0, at - first))
        scores, values = [], []
        for s in seen:
            kv = heads.kv.weight.double() @ context.x_BSD[b, s].double()
            kv = kv if heads.kv.bias is None else kv + heads.kv.bias.double()
            key, value = kv.view(2, heads.n_heads, heads.d_head)[:, h]
            key = placed(heads, heads.k_norm, key, max(0, s - first))
            scores.append(key @ query / heads.d_head**0.5)
            values.append(value)
        outputs.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    return torch.stack(outputs)


def loop_over_heads(heads: HeadGroups, context: Context, gates_NE: Tensor) -> Tensor:
    """Sums over the groups of heads whose gates are not zero, in double precision."""
    w_q, w_o, x_ND = exact(heads.w_q), exact(heads.w_o), context.x_BTD.flatten(0, 1)
    sums = torch.zeros(x_ND.shape, dtype=torch.double)
    for x, e in gates_NE.nonzero().tolist():
        q_R = w_q[e] @ x_ND[x].double()
        q_R = q_R if heads.b_q is None else q_R + heads.b_q[e].double()
        b, t = divmod(x, context.x_BTD.shape[1])
        heads_HC = attended(heads, context, b, t, q_R.view(heads.n_heads, -1))
        sums[x] += gates_NE[x, e].double() * (w_o[e] @ heads_HC.flatten())
    return sums if heads.b_o is None else sums + heads.b_o.double()
