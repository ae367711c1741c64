import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.gpu.sides import Models
from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts, SelectionPlan, TopK
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.experts import FeedForward

LOGGERS = ("lightning.pytorch", "lightning.fabric")


@pytest.fixture(autouse=True)
def logging_stays_as_it_was() -> Iterator[None]:
    """Benchmarks silence Lightning, whose messages other tests read."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def tiny() -> Models:
    """A model of two layers, its dense twin and a plan."""

    def make(attention: Any, feed_forward: Any) -> Decoder:
        torch.manual_seed(0)
        return Decoder(32, 16, 2, attention=attention, feed_forward=feed_forward)

    return Models(
        "tiny",
        partial(
            make,
            partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8),
            partial(MixtureOfExperts, n_experts=4, d_expert=8),
        ),
        partial(
            make,
            partial(GroupedQueryAttention, n_heads=4, n_kv_heads=1, d_head=8),
            partial(FeedForward, d_hidden=32),
        ),
        {"P": SelectionPlan(experts=TopK(2), attention=TopK(1))},
    )
