"""Scaled rotary frequencies, with the functions of transformers as judge."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lightning_dsmoe.attention import (
    GroupedQueryAttention,
    LinearRopeScaling,
    Llama3RopeScaling,
    MixtureOfAttentionHeads,
    RopeScaling,
    YarnRopeScaling,
)
from lightning_dsmoe.attention.rotary import rotary_of, rotate, rotation

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling | None]] = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 3.0}, LinearRopeScaling(3.0)),
    "llama3": (
        {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 256},
        Llama3RopeScaling(**LLAMA3, original_max_positions=256),
    ),
    "llama3 as published": (
        {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192},
        Llama3RopeScaling(**LLAMA3, original_max_positions=8192),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        YarnRopeScaling(4.0, 128),
    ),
    "yarn without rounding": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
            "truncate": False,
        },
        YarnRopeScaling(
            40.0, 512, beta_fast=16.0, beta_slow=2.0, attention_scale=1.25, truncate=False
        ),
    ),
}
SIZES = [(8, 10000.0, 1.0), (64, 500000.0, 1.0), (20, 10000.0, 0.5), (80, 10000.0, 0.4)]


def config(parameters: dict[str, Any], d_head: int, theta: float, fraction: float) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * d_head,
        num_attention_heads=4,
        head_dim=d_head,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, "partial_rotary_factor": fraction, **parameters},
    )


@pytest.mark.parametrize(("d_head", "theta", "fraction"), SIZES)
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_frequencies_are_those_of_transformers(
    name: str, d_head: int, theta: float, fraction: float
) -> None:
    parameters, scaling = SCALINGS[name]
    theirs = config(parameters, d_head, theta, fraction)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, None)
    rotary = rotary_of(d_head, theta, scaling, fraction)
    assert rotary is not None
    assert scaling is not None
    plain = theta ** (-torch.arange(0, rotary.d_rotary, 2).float() / rotary.d_rotary)
    torch.testing.assert_close(scaling.frequencies(plain), expected, rtol=1e-6, atol=0)
    assert not torch.equal(expected, plain)
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_those_of_transformers(name: str) -> None:
    parameters, scaling = SCALINGS[name]
    positions = torch.tensor([[0, 1, 2, 77, 300]])
    cos, sin = LlamaRotaryEmbedding(config(parameters, 16, 10000.0, 1.0))(torch.zeros(1), positions)
    found = rotation(positions, 16, 10000.0, scaling)
    torch.testing.assert_close(found.cos, cos, rtol=0, atol=3e-5)
    torch.testing.assert_close(found.sin.abs(), sin.abs(), rtol=0, atol=3e-5)
    assert torch.equal(found.sin[..., 8:].sign(), sin[..., 8:].sign())
    assert torch.equal(found.sin[..., :8], -found.sin[..., 8:])


def test_the_first_channels_rotate_and_the_others_stay() -> None:
    x = torch.randn(3, 5, 12)
    by = rotation(torch.arange(5), 4, 100.0)
    turned = rotate(x, by)
    assert torch.equal(turned[..., :4], rotate(x[..., :4].contiguous(), by))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[:, 1:, :4], x[:, 1:, :4])
    assert rotate(x.bfloat16(), by).dtype == torch.bfloat16


def test_one_pair_is_never_scaled_by_yarn() -> None:
    frequency = torch.ones(1)
    assert torch.equal(YarnRopeScaling(4.0, 128).frequencies(frequency), frequency)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config(SCALINGS["yarn"][0], 2, 100.0, 1.0), None)
    assert torch.equal(expected, frequency)


class Halved(RopeScaling):
    def frequencies(self, frequencies: Tensor) -> Tensor:
        return frequencies / 2


def test_a_scaling_of_ones_own() -> None:
    positions = torch.arange(6)
    assert Halved().attention_factor == 1
    halved, linear = (rotation(positions, 8, 100.0, s) for s in (Halved(), LinearRopeScaling(2.0)))
    assert torch.equal(halved.cos, linear.cos)
    torch.testing.assert_close(
        halved.cos[::2], rotation(positions[:3], 8, 100.0).cos, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRopeScaling(0.5), "a finite factor of at least 1, got 0.5"),
        (lambda: LinearRopeScaling(math.nan), "a finite factor of at least 1, got nan"),
        (lambda: Llama3RopeScaling(math.inf, 1.0, 4.0, 64), "finite factor .*, got inf"),
        (lambda: Llama3RopeScaling(8.0, 4.0, 4.0, 64), "low_freq_factor < .*, got 4.0 and 4.0"),
        (lambda: Llama3RopeScaling(8.0, 0.0, 4.0, 64), "low_freq_factor < .*, got 0.0 and 4.0"),
        (lambda: Llama3RopeScaling(8.0, 1.0, 4.0, 0), "max_positions must be at least 1, got 0"),
        (lambda: YarnRopeScaling(0.0, 64), "at least 1, got 0.0"),
        (lambda: YarnRopeScaling(2.0, 0), "original_max_positions must be at least 1, got 0"),
        (lambda: YarnRopeScaling(2.0, 64, beta_slow=40.0), "beta_slow < .*, got 40.0 and 32.0"),
        (lambda: YarnRopeScaling(2.0, 64, attention_scale=0.0), "attention_scale must be above 0"),
    ],
)
def test_numbers_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@dataclass
class Mutable(RopeScaling):
    factor: float

    def frequencies(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_scaling": 8.0}, "rope_scaling must be a RopeScaling, got 8.0"),
        ({"rope_scaling": Mutable(2.0)}, "Mutable must be hashable"),
        ({"rotary_fraction": 0.0}, "rotary_fraction must be above 0 and at most 1, got 0.0"),
        ({"rotary_fraction": 1.5}, "rotary_fraction must be above 0 and at most 1, got 1.5"),
        ({"rotary_fraction": 0.3}, "an even number of rotating .*got d_head=10, .*fraction=0.3"),
        ({"rotary_fraction": 0.05}, "an even number of rotating channels"),
        ({"rope_theta": None, "rotary_fraction": 0.2}, "need rotary positions"),
        ({"rope_theta": None, "rope_scaling": LinearRopeScaling(2.0)}, "need rotary positions"),
        ({"norm_eps": -1e-6}, "norm_eps must be 0 or more, got -1e-06"),
    ],
)
@pytest.mark.parametrize("cls", [GroupedQueryAttention, MixtureOfAttentionHeads])
def test_options_out_of_range(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(16, 4, 2, 10, **options)
