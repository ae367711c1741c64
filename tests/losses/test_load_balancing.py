import pytest
import torch

from lightning_dsmoe.losses import load_balancing_loss
from lightning_dsmoe.routing import TopK


@pytest.mark.parametrize("k", [1, 2, 4])
def test_uniform_probabilities_give_one_for_any_k(k: int) -> None:
    probs = torch.full((6, 4), 0.25)
    assert load_balancing_loss(probs, TopK(k).mask(probs)).item() == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_even_use_gives_one_for_any_k(k: int) -> None:
    probs = torch.randn(5, 4).softmax(-1)
    probs = torch.cat([probs.roll(shift, dims=-1) for shift in range(4)])
    assert load_balancing_loss(probs, TopK(k).mask(probs)).item() == pytest.approx(1)


def test_collapse_onto_one_expert_gives_their_number() -> None:
    probs = torch.eye(5)[:1].expand(7, 5)
    assert load_balancing_loss(probs, TopK(1).mask(probs)).item() == pytest.approx(5)


def test_value_by_hand_without_padding() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.0, 0.0, 1.0]])
    active = TopK(1).mask(probs)
    mask = torch.tensor([1, 1, 1, 0])
    expected = 3 * (2 / 3 * (1.3 / 3) + 1 / 3 * (1.4 / 3))
    assert load_balancing_loss(probs, active, mask).item() == pytest.approx(expected)


def test_descent_takes_probability_from_the_busiest_expert() -> None:
    logits = (torch.randn(64, 4) + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
    probs = logits.softmax(-1)
    load_balancing_loss(probs, TopK(2).mask(probs)).backward()
    assert logits.grad is not None
    assert logits.grad[:, 0].sum() > 0


def test_nothing_but_padding_gives_zero() -> None:
    probs = torch.rand(3, 4).softmax(-1).requires_grad_()
    loss = load_balancing_loss(probs, TopK(1).mask(probs), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert probs.grad is not None
    assert probs.grad.isfinite().all()


def test_autocast_leaves_it_in_float32() -> None:
    probs = torch.randn(50, 7).softmax(-1)
    active = TopK(2).mask(probs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = load_balancing_loss(probs, active)
    assert torch.equal(inside, load_balancing_loss(probs, active))
