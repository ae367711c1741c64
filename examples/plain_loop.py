"""A mixture of experts in a plain PyTorch loop: trained with all experts, run with one or two.

    python examples/plain_loop.py

Shapes: N points.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe import (
    MixtureOfExperts,
    OutputOnly,
    RoutingLoss,
    SelectionPlan,
    TopK,
    record_routings,
    run_plan,
)

PLANS = {
    "all 8 experts": SelectionPlan(),
    "the best 2 of each point": SelectionPlan(experts=TopK(2)),
    "the best one of each point": SelectionPlan(experts=TopK(1)),
}


def points(n_points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points around the eight corners of a cube, each with a wave whose phase is the corner's."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    corner_N = torch.randint(8, (n_points,), generator=generator)
    offsets_N3 = 0.3 * torch.randn(n_points, 3, generator=generator)
    waves_N = torch.sin(4 * offsets_N3.sum(-1) + corner_N)
    return corners[corner_N] + offsets_N3, waves_N[:, None]


def network() -> nn.Module:
    """A regression whose hidden layer is a mixture of eight experts."""
    mixture = MixtureOfExperts(64, n_experts=8, d_expert=32)
    return nn.Sequential(nn.Linear(3, 64), nn.GELU(), OutputOnly(mixture), nn.Linear(64, 1))


def train(model: nn.Module, steps: int, generator: torch.Generator) -> None:
    """Train every expert on every point."""
    routing_loss = RoutingLoss(expert_mi=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = points(256, generator)
        with record_routings(model) as record:
            loss = F.mse_loss(model(x), y)
        (loss + routing_loss(record)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def error(model: nn.Module, plan: SelectionPlan, generator: torch.Generator) -> float:
    """Mean squared error at new points under a plan."""
    x, y = points(10_000, generator)
    with run_plan(model, plan):
        return F.mse_loss(model(x), y).item()


if __name__ == "__main__":
    torch.manual_seed(1)
    model = network()
    train(model, 1000, torch.Generator().manual_seed(1))
    for name, plan in PLANS.items():
        print(f"{name}: error {error(model, plan, torch.Generator().manual_seed(2)):.4f}")
