"""A plain PyTorch loop, for a few steps."""

import torch

from examples import plain_loop


def error(model: torch.nn.Module, plan: str) -> float:
    return plain_loop.error(model, plain_loop.PLANS[plan], torch.Generator().manual_seed(2))


def test_one_expert_learns_most_of_what_all_do() -> None:
    model = plain_loop.network()
    untrained = error(model, "all 8 experts")
    plain_loop.train(model, 300, torch.Generator().manual_seed(1))
    dense, sparse = error(model, "all 8 experts"), error(model, "the best one of each point")
    assert dense < 0.5 * untrained
    assert dense < sparse < 0.7 * untrained


def test_the_routing_loss_is_what_makes_points_choose() -> None:
    model = plain_loop.network()
    plain_loop.train(model, 100, torch.Generator().manual_seed(1))
    x, _ = plain_loop.points(1000, torch.Generator().manual_seed(2))
    with plain_loop.record_routings(model) as record:
        model(x)
    [routing] = record.routings.values()
    assert routing.probs.amax(-1).mean() > 0.7
