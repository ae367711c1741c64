"""A block on one new token of each of a few sequences: what comes before and after attention.

Two pieces, each compiled into a few kernels that blocks alike share. Attention itself stands
between them, for it is the only part whose shapes depend on how many positions there are.

Shapes: B sequences, one new token of each; D model width, K slots of experts, R rows of a weight,
F expert width, H KV heads, S slots of the cache, C head width, V vocabulary.
"""

from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.attention.head_norm import HeadNorm
from lightning_dsmoe.attention.rotary import Rotary, Rotation, rotate, rotation
from lightning_dsmoe.decoder import Block
from lightning_dsmoe.experts import Experts, MixtureOfExperts
from lightning_dsmoe.inference.engine.decode_cuda.expert_slots import (
    ExpertSlots,
    all_slots,
    choose_slots,
)
from lightning_dsmoe.inference.engine.decode_cuda.products import Products
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major
from lightning_dsmoe.routing import Selection


class AttentionInputs(NamedTuple):
    """What attention takes, and the groups of heads that run.

    Shape:
        q_BHKC: queries, of the type of the keys. Groups share keys and values, so they stand where
            the positions of a sequence stand otherwise.
        keys_BHC: keys of the new tokens.
        values_BHC: their values.
        slots: the groups.
    """

    q_BHKC: Tensor
    keys_BHC: Tensor
    values_BHC: Tensor
    slots: ExpertSlots


def embed(
    embedding: nn.Module,
    positions: nn.Module | None,
    rotaries: list[Rotary],
    tokens_B: Tensor,
    positions_B: Tensor,
) -> tuple[Tensor, ...]:
    """Tokens `[B, D]`, and the `Rotation` of `[B, 1, R]` of each kind of heads.

    Args:
        embedding: that of the tokens.
        positions: that of their positions; None for none.
        rotaries: the kinds of heads.
        tokens_B: the tokens.
        positions_B: where they stand.
    """
    x_BD: Tensor = embedding(tokens_B)
    if positions is not None:
        x_BD = x_BD + positions(positions_B)
    rotations = [rotation(positions_B[:, None], *rotary) for rotary in rotaries]
    return (x_BD, *(angles for each in rotations for angles in each))


def before_attention(
    block: Block, selection: Selection, x_BD: Tensor, angles: tuple[Tensor, ...], products: Products
) -> AttentionInputs:
    """Queries of the groups that run, and new keys and values.

    Args:
        block: the block, packed.
        selection: the groups that run.
        x_BD: tokens.
        angles: rotation of queries and keys; empty for none.
        products: the way to multiply.
    """
    layer = cast(MixtureOfAttentionHeads, block.attention)
    heads = layer.heads
    normed_BD = block.attention_norm(x_BD)
    slots = _choose(layer, heads.n_groups, selection, normed_BD)
    kv_B2HC = heads.kv(normed_BD).unflatten(-1, (2, heads.n_heads, heads.d_head))
    keys_BHC = heads.k_norm(kv_B2HC[:, 0])
    q_KBR = products.project(as_row_major(heads.w_q), normed_BD, slots)
    if heads.b_q is not None:
        q_KBR = q_KBR + heads.b_q[slots.experts_K][:, None]
    q_KBHC = _normalized(heads, q_KBR.unflatten(-1, (heads.n_heads, heads.d_head)))
    if angles:
        by = Rotation(*angles)
        keys_BHC, q_KBHC = rotate(keys_BHC, by), rotate(q_KBHC, by)
    q_BHKC = rearrange(q_KBHC.to(x_BD.dtype), "k b h c -> b h k c").contiguous()
    return AttentionInputs(q_BHKC, keys_BHC.to(x_BD.dtype), kv_B2HC[:, 1].to(x_BD.dtype), slots)


def attend(
    inputs: AttentionInputs, keys_SBHC: Tensor, values_SBHC: Tensor, seen_SB: Tensor, at_1: Tensor
) -> Tensor:
    """Write new keys and values, and attend to all positions seen: `[B, H, K, C]`."""
    keys_SBHC.index_copy_(0, at_1, inputs.keys_BHC[None])
    values_SBHC.index_copy_(0, at_1, inputs.values_BHC[None])
    return F.scaled_dot_product_attention(
        inputs.q_BHKC,
        rearrange(keys_SBHC, "s b h c -> b h s c"),
        rearrange(values_SBHC, "s b h c -> b h s c"),
        attn_mask=rearrange(seen_SB, "s b -> b 1 1 s"),
    )


def after_attention(
    block: Block,
    selection: Selection,
    x_BD: Tensor,
    heads_BHKC: Tensor,
    slots: ExpertSlots,
    products: Products,
) -> Tensor:
    """Tokens `[B, D]` after the outputs of attention and of the feed-forward layer were added.

    Args:
        block: the block, packed.
        selection: the feed-forward experts that run.
        x_BD: tokens.
        heads_BHKC: what attention gives.
        slots: the groups of heads that ran.
        products: the way to multiply.
    """
    heads = cast(MixtureOfAttentionHeads, block.attention).heads
    heads_KBR = rearrange(heads_BHKC, "b h k c -> k b (h c)") * slots.gates_KB[..., None]
    attended_BD = products.project_and_sum(as_row_major(heads.w_o), heads_KBR, slots)
    if heads.b_o is not None:
        attended_BD = attended_BD + heads.b_o
    x_BD = x_BD + attended_BD.to(x_BD.dtype)
    layer = cast(MixtureOfExperts, block.feed_forward)
    normed_BD = block.feed_forward_norm(x_BD)
    fed_BD = _run(layer.experts, normed_BD, _choose(layer, 1, selection, normed_BD), products)
    if isinstance(layer, MixtureOfExperts) and layer.shared is not None:
        gates_B1 = normed_BD.new_ones(len(normed_BD), 1, dtype=torch.float32)
        if layer.shared_gate is not None:
            gates_B1 = layer.shared_gate(normed_BD).sigmoid()
        fed_BD = fed_BD + _run(layer.shared.experts, normed_BD, all_slots(gates_B1.T), products)
    return x_BD + fed_BD.to(x_BD.dtype)


def predict(norm: nn.Module, head: nn.Module, x_BD: Tensor, products: Products) -> Tensor:
    """Logits `[B, V]`."""
    normed_BD: Tensor = norm(x_BD)
    if isinstance(head, Int8Head):
        one = all_slots(normed_BD.new_ones(1, len(normed_BD)))
        return products.project(head.rows, normed_BD, one)[0].to(x_BD.dtype)
    logits_BV: Tensor = head(normed_BD)
    return logits_BV


def _choose(layer: nn.Module, n_all: int, selection: Selection, x_BD: Tensor) -> ExpertSlots:
    """The experts of a layer that run; without a router all `n_all`, under gates of 1."""
    if isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        chosen = choose_slots(selection, layer.router(x_BD), layer.remaining)
        return chosen._replace(gates_KB=chosen.gates_KB * layer.gate_factor)
    return all_slots(x_BD.new_ones(n_all, len(x_BD), dtype=torch.float32))


def _run(experts: Experts, x_BD: Tensor, slots: ExpertSlots, products: Products) -> Tensor:
    """Sum of the experts' outputs times their gates: `[B, D]`."""
    projected_KBR = products.project(as_row_major(experts.w_in), x_BD, slots)
    if experts.b_in is not None:
        projected_KBR = projected_KBR + experts.b_in[slots.experts_K][:, None]
    hidden_KBF = experts.hidden(projected_KBR) * slots.gates_KB[..., None]
    y_BD = products.project_and_sum(as_row_major(experts.w_out), hidden_KBF, slots)
    return y_BD if experts.b_out is None else y_BD + experts.b_out


def _normalized(heads: HeadGroups, q_KBHC: Tensor) -> Tensor:
    """Queries after their norm: over each head, or over all heads of all groups of a token."""
    if isinstance(heads.q_norm, HeadNorm) and len(heads.q_norm.normalized_shape) > 1:
        normed_BKHC: Tensor = heads.q_norm(q_KBHC.transpose(0, 1))
        return normed_BKHC.transpose(0, 1)
    normed_KBHC: Tensor = heads.q_norm(q_KBHC)
    return normed_KBHC
