"""Networks whose forward is not the library's, with routed layers in several places."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Block
from lightning_dsmoe.experts import GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.routing import (
    AllExperts,
    LinearRouter,
    MixtureOutput,
    OutputOnly,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

SELECTIONS: list[Selection] = [
    AllExperts(),
    TopK(1),
    TopK(2, renormalize=True),
    Threshold(0.8),
    ThresholdTopK(0.8),
    TopP(0.6),
]
ROUTER = partial(LinearRouter, init_std=0.5)
BIASED = partial(MLPExperts, bias=True)
GLU = partial(GLUExperts, activation="silu")


class Halved(MixtureOfExperts):
    """A layer of a user's own: its forward does more than that of its base."""

    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Half the output."""
        output, routing = super().forward(x, selection)
        return MixtureOutput(output / 2, routing)


class Network(nn.Module):
    """Layers of both kinds at several depths, tied weights, and buffers of two kinds."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.into = nn.Linear(6, 24)
        options = {"n_experts": 3, "n_heads": 2, "d_head": 4, "router": ROUTER, "bias": True}
        self.attention = MixtureOfAttentionHeads(24, **{**options, **attention})
        shared = MixtureOfExperts(24, 5, 18, router=ROUTER, experts=BIASED, d_shared=7)
        self.body = nn.Sequential(nn.LayerNorm(24), OutputOnly(shared))
        self.paper = MixtureOfExperts(
            24, 5, 18, router=ROUTER, experts=GLU, gate_scale="sum_to_one"
        )
        self.own = Halved(24, 4, 10, router=ROUTER)
        self.block = Block(
            24,
            attention=partial(MixtureOfAttentionHeads, **options),
            feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=10, router=ROUTER),
        )
        self.out = nn.Linear(24, 6, bias=False)
        self.tied = nn.Linear(24, 6, bias=False)
        self.tied.weight = self.out.weight
        self.register_buffer("bounds", torch.tensor([-torch.inf, torch.inf]))
        self.register_buffer("steps", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `[B, T, 6]` to as many."""
        x = self.into(x)
        x = x + self.attention(x, mask=mask).output
        x = x + self.body(x)
        x = x + self.paper(x).output
        x = x + self.own(x).output
        x = self.block(x, mask=mask).x
        y: Tensor = (self.out(x) + self.tied(x)).clamp(*self.bounds) + self.steps.sum()
        return y


def network(**attention: Any) -> Network:
    """One in evaluation mode, with biases that are not zero."""
    made = Network(**attention).eval()
    for name, parameter in made.named_parameters():
        if ".b_" in name:
            nn.init.normal_(parameter, std=0.3)
    return made


def plan_of(selection: Selection) -> SelectionPlan:
    """The same selection everywhere but in one layer."""
    return SelectionPlan(selection, selection, layers={"paper": TopK(2)})
