"""What `record_routings` adds to a training step.

    python -m benchmarks.speed.recording

The ratio of whole steps is below the noise of most machines. So what a record adds is timed on
layers that do nothing, as many as the model has, and divided by the median time of its step: a
language model of 4 layers of width 128 on 12 x 128 tokens, and the vision transformer of the
examples on 64 images.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.training import NANO, VOCABULARY, ds_moe
from benchmarks.timing import interleave, machine
from examples import vision
from lightning_dsmoe import AllExperts, RoutedLayer, RoutingLoss, record_routings, routed_layers
from lightning_dsmoe.routing import LinearRouter, MixtureOutput, Routing, Selection

_CALLS = 200
_ALL_EXPERTS = AllExperts()


class Idle(RoutedLayer):
    """Says what it was told to say."""

    def __init__(self) -> None:
        super().__init__()
        self.n_experts, self.router = 2, LinearRouter(1, 2)
        self.said = MixtureOutput(torch.zeros(1), Routing(torch.zeros(1, 2), torch.zeros(1, 2)))

    def forward(self, x: Tensor, selection: Selection = _ALL_EXPERTS) -> MixtureOutput:
        """Nothing."""
        return self.said


def main() -> None:
    """Measure both models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (12, 128))
    images, digits = torch.rand(64, 8, 8), torch.randint(10, (64,))
    language, sight = ds_moe(NANO), vision.mixture()
    sides: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "language model": (language, lambda: language(tokens).logits.square().mean()),
        "vision transformer": (sight, lambda: F.cross_entropy(sight(images), digits)),
    }
    print(f"{machine()}\n\n| model | routed layers | step, ms | a record, ms | share |")
    print("|---|---|---|---|---|")
    for name, (model, loss) in sides.items():
        n_layers = len(routed_layers(model))
        step = _step(model, loss)
        seconds = interleave(step, step, rounds=options.rounds, calls=1).candidate
        added = record_seconds(n_layers, rounds=options.rounds)
        share = f"{100 * added / seconds:.2g} %"
        print(f"| {name} | {n_layers} | {1e3 * seconds:.3g} | {1e3 * added:.2g} | {share} |")


def record_seconds(n_layers: int, *, rounds: int) -> float:
    """What a record adds to one call of each of some layers."""
    layers, x = nn.ModuleList(Idle() for _ in range(n_layers)), torch.zeros(1)

    def plain() -> None:
        for layer in layers:
            layer(x)

    def recorded() -> Any:
        with record_routings(layers) as record:
            plain()
        return record.routings

    both = interleave(recorded, plain, rounds=rounds, calls=_CALLS, warm_up=_CALLS)
    return both.candidate - both.reference


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters())
    routing_loss = RoutingLoss()

    def step() -> None:
        with record_routings(model) as record:
            total = loss() + routing_loss(record)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
