"""Layers that run each expert on its own tokens in one product of PyTorch, for GPUs.

`torch.nn.functional.grouped_mm` reads from a tensor on the device where the tokens of an expert
end, so no layer waits for the device. Outputs are added up token by token: each sum has a fixed
order, with no atomic addition, and is the same at every run.

Shapes: N tokens, E experts, D model width, R rows of one expert, F expert width; P (token, expert)
pairs in the order in which they run, see `PairsOnDevice`; I and O the inputs and outputs of a
matrix; B sequences, T new positions, S positions so far, H KV heads, C head width, K active groups
of query heads, at most, of one token, Q = N·K.
"""

import warnings
from functools import cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.batched.masked_layers import attend_groups
from lightning_dsmoe.inference.engine.batched.pairs_on_device import PairsOnDevice
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major

_ALIGNMENT = 16  # bytes, of the strides of each matrix
# Hopper and Blackwell of data centres; others, and types other than bfloat16, take a loop in
# PyTorch that waits for the device.
_CAPABILITIES = 9, 10


def add_grouped_experts(
    residual_ND: Tensor, experts: Experts, x_ND: Tensor, pairs: PairsOnDevice
) -> None:
    """Add the outputs of each token's experts under their gates to the residual stream, in place.

    Args:
        residual_ND: the residual stream.
        experts: the experts, packed.
        x_ND: normalized tokens.
        pairs: which token runs which expert under which gate.
    """
    projected_PR = grouped_products(x_ND[pairs.token_P], experts.w_in, pairs.ends_E)
    if experts.b_in is not None:
        projected_PR += experts.b_in[pairs.expert_P]
    hidden_PF = experts.hidden(projected_PR)
    hidden_PF = hidden_PF * pairs.gate_P[:, None].to(hidden_PF.dtype)
    residual_ND += sum_of_pairs(grouped_products(hidden_PF, experts.w_out, pairs.ends_E), pairs)
    if experts.b_out is not None:
        residual_ND += experts.b_out


def add_grouped_heads(
    residual_ND: Tensor,
    heads: HeadGroups,
    x_BTD: Tensor,
    scope: Scope,
    keys_BHSC: Tensor,
    values_BHSC: Tensor,
    pairs: PairsOnDevice,
) -> None:
    """Add the attention of each token's groups of heads under their gates, in place.

    Args:
        residual_ND: the residual stream.
        heads: the groups of query heads, packed.
        x_BTD: normalized tokens.
        scope: which positions attend to which.
        keys_BHSC: keys of all positions so far.
        values_BHSC: their values.
        pairs: which token runs which group under which gate.
    """
    batch, length, _ = x_BTD.shape
    q_PR = grouped_products(x_BTD.flatten(0, 1)[pairs.token_P], heads.w_q, pairs.ends_E)
    if heads.b_q is not None:
        q_PR += heads.b_q[pairs.expert_P]
    # The active groups of a token take its K slots, whichever they are: keys and values are shared.
    # Those that it does not fill have the queries of the spare pair; nobody reads what they find.
    q_BTKHC = q_PR[pairs.place_NK].view(batch, length, -1, heads.n_heads, heads.d_head)
    heads_BTKR = attend_groups(heads, q_BTKHC, scope, keys_BHSC, values_BHSC)
    heads_QR = rearrange(heads_BTKR, "b t k r -> (b t k) r")
    place_Q = pairs.place_NK.flatten()
    slot_P = torch.zeros_like(pairs.token_P)
    slot_P.scatter_(0, place_Q, torch.arange(len(place_Q), device=place_Q.device))
    heads_PR = heads_QR[slot_P] * pairs.gate_P[:, None].to(heads_QR.dtype)
    residual_ND += sum_of_pairs(grouped_products(heads_PR, heads.w_o, pairs.ends_E), pairs)
    if heads.b_o is not None:
        residual_ND += heads.b_o


def grouped_products(x_PI: Tensor, weights: nn.Module, ends_E: Tensor) -> Tensor:
    """The product of each pair with the rows of its expert, `[P, O]`; undefined after the last end.

    Args:
        x_PI: an input for each pair.
        weights: row-major weights `[E, O, I]`; those in 8 bits are dequantized, all experts' of
            them, as no more is known beforehand.
        ends_E: where the pairs of each expert end, int32.
    """
    rows_EOI = as_row_major(weights).rows(slice(None))
    return F.grouped_mm(x_PI.contiguous(), rows_EOI.mT, offs=ends_E)


def sum_of_pairs(out_PD: Tensor, pairs: PairsOnDevice) -> Tensor:
    """The sum of each token's pairs, `[N, D]`: one kernel, which adds up in float32 on a GPU."""
    spare = len(out_PD) - 1  # is skipped
    return F.embedding_bag(pairs.place_NK, out_PD, mode="sum", padding_idx=spare)


def is_possible(x: Tensor, *weights: nn.Module) -> bool:
    """Whether tokens and row-major weights suit `grouped_mm` and it waits for nothing here.

    Args:
        x: the tokens.
        weights: the weights of a layer.
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return fit(x, *weights) and works_on(x.device)


def fit(x: Tensor, *weights: nn.Module) -> bool:
    """Whether all widths are multiples of 16 bytes and all types are that of the tokens."""
    sizes = [size for weight in weights for size in as_row_major(weight).weight.shape[1:]]
    aligned = all(size * x.element_size() % _ALIGNMENT == 0 for size in sizes)
    return aligned and all(as_row_major(weight).out_dtype == x.dtype for weight in weights)


@cache
def works_on(device: torch.device) -> bool:
    """Whether `grouped_mm` multiplies bfloat16 here without waiting, and what it gives is right.

    Some builds of PyTorch gave wrong products of transposed views, without a word, so it is tried
    once in a process.
    """
    major, _ = torch.cuda.get_device_capability(device)
    if not hasattr(F, "grouped_mm") or major not in _CAPABILITIES:
        return False
    wait_mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")  # the comparison waits for the device
    try:
        if gives_right_products(device):
            return True
        reason = "gives wrong products"
    except RuntimeError as error:
        reason = f"fails: {' '.join(str(error).split())[:200]}"
    finally:
        torch.cuda.set_sync_debug_mode(wait_mode)
    warnings.warn(f"torch's grouped_mm {reason}; experts run one by one, more slowly", stacklevel=2)
    return False


def gives_right_products(device: torch.device) -> bool:
    """Whether `grouped_mm` agrees with a loop over experts, one of which has no token."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((300, 128), (3, 192, 128))
    x_PI, w_EOI = (torch.randn(size, generator=generator).to(device).bfloat16() for size in sizes)
    ends = [170, 170, 299]
    ends_E = torch.tensor(ends, dtype=torch.int32, device=device)
    actual = F.grouped_mm(x_PI, w_EOI.mT, offs=ends_E)[: ends[-1]].float()
    parts = zip(x_PI[: ends[-1]].tensor_split(ends[:-1]), w_EOI, strict=True)
    expected = torch.cat([x_MI.float() @ w_OI.float().T for x_MI, w_OI in parts])
    return bool(((actual - expected).abs().amax() < 0.01 * expected.abs().amax()).item())
