from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.routing import LinearRouter

MakeDecoder = Callable[..., Decoder]


def rotary_glu(**options: object) -> Decoder:
    router = partial(LinearRouter, init_std=0.3)
    return Decoder(
        97,
        32,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8, router=router),
        feed_forward=partial(
            MixtureOfExperts,
            n_experts=4,
            d_expert=24,
            router=router,
            experts=partial(GLUExperts, activation="silu"),
        ),
        **options,
    )


def learned_positions_mlp(**options: object) -> Decoder:
    router = partial(LinearRouter, init_std=0.3)
    return Decoder(
        101,
        48,
        3,
        attention=partial(
            MixtureOfAttentionHeads,
            n_experts=3,
            n_heads=2,
            d_head=8,
            router=router,
            rope_theta=None,
            qk_norm=True,
            bias=True,
        ),
        feed_forward=partial(
            MixtureOfExperts,
            n_experts=5,
            d_expert=20,
            router=router,
            experts=partial(MLPExperts, bias=True),
            d_shared=12,
        ),
        **{"max_positions": 64, "tie_embeddings": False, "dropout": 0.1} | options,
    )


@pytest.fixture(params=[rotary_glu, learned_positions_mlp])
def make_decoder(request: pytest.FixtureRequest) -> MakeDecoder:
    return request.param


@pytest.fixture
def decoder(make_decoder: MakeDecoder) -> Decoder:
    return make_decoder().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    i = torch.arange(4096)
    return list(((7 * i**2 + 3 * i + 11) % 97).view(-1, 16).split(3))
