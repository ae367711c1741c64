import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import (
    GroupedQueryAttention,
    Llama3RopeScaling,
    MixtureOfAttentionHeads,
    YarnRopeScaling,
)
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.inference.engine.batched.forward import forward_tokens
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode.step import BlockStep, EmbedStep, PredictStep
from lightning_dsmoe.inference.engine.weights.packing import pack
from lightning_dsmoe.routing import (
    AllExperts,
    LinearRouter,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

MakeDecoder = Callable[[], Decoder]

V = 66
SELECTIONS: list[Selection] = [
    AllExperts(),
    TopK(1),
    TopK(2),
    TopK(2, renormalize=True),
    Threshold(0.8),
    Threshold(0.8, renormalize=True),
    ThresholdTopK(0.8),
    ThresholdTopK(0.8, renormalize=True),
    TopP(0.6),
    TopP(0.6, renormalize=True),
]

ROUTER = partial(LinearRouter, init_std=0.5)
ATTENTION = partial(MixtureOfAttentionHeads, n_experts=3, n_heads=2, d_head=8, router=ROUTER)
FEED_FORWARD = partial(MixtureOfExperts, n_experts=5, d_expert=20, router=ROUTER)


def rotary_mlp() -> Decoder:
    """Odd sizes, biases and a shared expert."""
    mlp = partial(MLPExperts, bias=True)
    feed_forward = partial(FEED_FORWARD, experts=mlp, d_shared=12)
    return uneven(Decoder(V, 48, 2, attention=ATTENTION, feed_forward=feed_forward))


def learned_positions_glu(*, max_positions: int = 90) -> Decoder:
    """Rows enough to unroll loops over them, norms of heads, and gates of the paper's size."""
    glu = partial(GLUExperts, activation="silu")
    return uneven(
        Decoder(
            V,
            72,
            2,
            attention=partial(
                ATTENTION, rope_theta=None, qk_norm=True, bias=True, gate_scale="sum_to_one"
            ),
            feed_forward=partial(FEED_FORWARD, d_expert=34, experts=glu),
            norm=nn.LayerNorm,
            max_positions=max_positions,
            tie_embeddings=False,
        )
    )


def without_routers() -> Decoder:
    attention = partial(GroupedQueryAttention, n_heads=6, n_kv_heads=2, d_head=6, bias=True)
    feed_forward = partial(FeedForward, d_hidden=21)
    return uneven(Decoder(V, 30, 2, attention=attention, feed_forward=feed_forward))


def unlike_layers() -> Decoder:
    """Layers with other KV heads, positions, norms and biases, and a gate of the shared expert."""
    projection = partial(
        GroupedQueryAttention,
        n_heads=6,
        n_kv_heads=3,
        d_head=10,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, original_max_positions=16),
        rotary_fraction=0.45,
        qk_norm="projection",
        norm_eps=0.1,
        bias=True,
        output_bias=False,
    )
    of_heads = partial(
        ATTENTION,
        rope_theta=500.0,
        rope_scaling=YarnRopeScaling(4.0, original_max_positions=16),
        qk_norm=True,
        norm_eps=0.1,
        output_bias=True,
    )
    gelu = partial(MLPExperts, activation="gelu_tanh", bias=True)
    gated = partial(FEED_FORWARD, d_shared=12, shared_gate=True, experts=gelu)
    return uneven(
        Decoder(
            V,
            40,
            2,
            attention=[projection, of_heads],
            feed_forward=[gated, partial(FeedForward, d_hidden=21, experts=GLUExperts)],
        )
    )


def uneven(decoder: Decoder) -> Decoder:
    """Draw what starts at zero or one, and what is too small to be seen, anew."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                loud = any(part in name for part in ("router", "embedding", "positions", "head."))
                std = 0.5 if loud else 0.12
                parameter.normal_(std=std, generator=generator)
    return decoder.eval()


def packed(decoder: Decoder, *, int8: bool = False) -> Decoder:
    twin = copy.deepcopy(decoder).requires_grad_(False)
    pack(twin, quantization="int8" if int8 else None, quantize_head=int8)
    return twin


def uniform(selection: Selection) -> SelectionPlan:
    return SelectionPlan(experts=selection, attention=selection)


def assert_near(found: Tensor, expected: Tensor, relative: float = 2e-6) -> None:
    """Equal but for rounding, measured by the largest value."""
    assert found.dtype == expected.dtype
    bound = relative * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


class Steps:
    """All parts of a decode step, uncompiled."""

    n_sequences: int

    def __init__(self, decoder: Decoder, plan: SelectionPlan) -> None:
        self.embed, self.predict = EmbedStep(decoder), PredictStep(decoder)
        selections = zip(decoder.blocks, *decoder.selections(plan), strict=True)
        self.blocks = [BlockStep(*arguments) for arguments in selections]

    @torch.no_grad()
    def __call__(self, tokens_B: Tensor, cache: DecoderCache) -> Tensor:
        slots = cache.next_slots()
        x_BD, *angles = self.embed(tokens_B, slots.seen_SB)
        parts = zip(self.blocks, slots.keys, slots.values, self.embed.angles_of, strict=True)
        for block, keys, values, own in parts:
            x_BD = block(x_BD, keys, values, slots.seen_SB, slots.at_1, *angles[own])
        return self.predict(x_BD)


@torch.no_grad()
def token_by_token(
    decoder: Decoder, plan: SelectionPlan, tokens: Tensor, prompt: int, mask: Tensor | None = None
) -> Tensor:
    """Logits of the plain decoder for each token, the first `prompt` of them in one call."""
    caches = decoder.new_caches(*tokens.shape)
    first = None if mask is None else mask[:, :prompt]
    logits = []
    if prompt:
        logits = [decoder(tokens[:, :prompt], plan, mask=first, caches=caches).logits]
    for tokens_B1 in tokens[:, prompt:].split(1, dim=1):
        logits.append(decoder(tokens_B1, plan, caches=caches).logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def in_steps(
    decoder: Decoder, plan: SelectionPlan, tokens: Tensor, prompt: int, mask: Tensor | None = None
) -> Tensor:
    """Logits of the steps of a packed decoder for each token after the prompt."""
    cache = DecoderCache(decoder, *tokens.shape)
    if prompt:
        first = None if mask is None else mask[:, :prompt]
        start = tokens[:, :prompt]
        forward_tokens(decoder, start, plan, grouped=False, mask=first, caches=cache.layers)
    step = Steps(decoder, plan)
    return torch.stack([step(tokens_B, cache) for tokens_B in tokens[:, prompt:].T], 1)


ALIKE = [rotary_mlp, learned_positions_glu, without_routers]
DECODERS = [*ALIKE, unlike_layers]


@pytest.fixture(params=ALIKE)
def make_decoder(request: pytest.FixtureRequest) -> MakeDecoder:
    return request.param


@pytest.fixture
def decoder(make_decoder: MakeDecoder) -> Decoder:
    return make_decoder()


@pytest.fixture
def one_decoder() -> Decoder:
    return rotary_mlp()


@pytest.fixture(params=SELECTIONS, ids=str)
def selection(request: pytest.FixtureRequest) -> Selection:
    return request.param


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(V, (3, 14), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def mask() -> Tensor:
    """Prompts of 9, 4 and 1 tokens, padded on the left, and 5 tokens more."""
    starts = torch.tensor([0, 5, 8])
    return torch.arange(14) >= starts[:, None]
