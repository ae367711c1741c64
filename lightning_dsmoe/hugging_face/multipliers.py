"""The constants of Granite's forward pass, taken up by weights."""

import math

import torch
from torch import nn

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.hugging_face.families.naming import blocks_of
from lightning_dsmoe.hugging_face.source_model import Multipliers


@torch.no_grad()
def fold(multipliers: Multipliers, decoder: Decoder) -> None:
    """Scale the weights of a decoder in place, so that it computes the same without constants.

    The attention's constant goes into the queries, that of the residual stream into what is added
    to it, that of the embeddings into them. Where the head shares these, the last norm takes up
    the inverse, and the constant of the logits in any case. Weights change by rounding alone.

    Args:
        multipliers: the constants.
        decoder: one whose heads scale scores by 1 / sqrt(d_head).
    """
    if multipliers == Multipliers():
        return
    for block in blocks_of(decoder):
        heads = block.attention.heads
        assert isinstance(heads, HeadGroups)
        if multipliers.attention is not None:
            scale = multipliers.attention * math.sqrt(heads.d_head)
            _scale(scale, heads.w_q.weight, heads.b_q)
        _scale(multipliers.residual, heads.w_o.weight, heads.b_o)
        layer = block.feed_forward
        assert isinstance(layer, MixtureOfExperts | FeedForward)
        _scale(multipliers.residual, layer.experts.w_out.weight, layer.experts.b_out)
        shared = getattr(layer, "shared", None)
        if isinstance(shared, FeedForward):
            _scale(multipliers.residual, shared.experts.w_out.weight, shared.experts.b_out)
    _scale(multipliers.embedding, decoder.embedding.weight)
    tied = multipliers.embedding if decoder.tie_embeddings else 1.0
    norm = decoder.norm
    assert isinstance(norm, nn.RMSNorm)
    _scale(multipliers.logits / tied, norm.weight)


def _scale(factor: float, *weights: torch.Tensor | None) -> None:
    if not math.isclose(factor, 1, rel_tol=1e-12):
        for weight in weights:
            if weight is not None:
                weight.mul_(factor)
