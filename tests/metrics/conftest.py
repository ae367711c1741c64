from functools import partial

import pytest

from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, GLUExperts, MixtureOfExperts


@pytest.fixture
def small_decoder() -> Decoder:
    return Decoder(
        97,
        32,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=24, experts=GLUExperts),
    )


@pytest.fixture
def mixed_decoder() -> Decoder:
    """First layer plain, second a mixture of experts, third a mixture of heads."""
    decoder = Decoder(
        10,
        8,
        3,
        attention=partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4),
        feed_forward=partial(FeedForward, d_hidden=15),
    )
    decoder.blocks[1].feed_forward = MixtureOfExperts(8, 3, 5)
    decoder.blocks[2].attention = MixtureOfAttentionHeads(8, 2, 1, 4)
    return decoder


@pytest.fixture(params=["small_decoder", "mixed_decoder"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    decoder: Decoder = request.getfixturevalue(request.param)
    return decoder
