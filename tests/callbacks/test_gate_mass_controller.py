import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsmoe.callbacks import SparsityTarget
from lightning_dsmoe.callbacks.gate_mass_controller import GateMassController, gate_mass_totals


@given(k=st.integers(1, 5), seed=st.integers(0, 99))
def test_mass_is_that_of_sorted_probabilities(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(2, 4, 5, generator=generator).softmax(-1)
    mask = torch.rand(2, 4, generator=generator) < 0.7
    mask[0, 0] = True
    for counted, given_mask in ((probs[mask], mask), (probs.flatten(0, 1), None)):
        total, tokens = gate_mass_totals(probs, k, given_mask).tolist()
        assert tokens == len(counted)
        naive = sum(sum(sorted(row, reverse=True)[:k]) for row in counted.tolist()) / tokens
        assert total / tokens == pytest.approx(naive, rel=1e-6)


@given(
    factor=st.floats(0.2, 5),
    mass=st.floats(0, 1),
    before=st.floats(0, 1),
    target=st.floats(0.01, 0.99),
    rate=st.floats(1.01, 2),
)
def test_a_change_is_bounded_and_without_a_trend_towards_the_target(
    factor: float, mass: float, before: float, target: float, rate: float
) -> None:
    make = partial(GateMassController, target, rate, 5)
    change = partial(make(least=0.1, most=10).next_factor, factor, mass)
    new = change(before)
    assert factor / rate * (1 - 1e-12) <= new <= factor * rate * (1 + 1e-12)
    assert (change(mass) - factor) * (target - mass) >= -1e-12
    assert make(least=1, most=1).next_factor(factor, mass, before) == 1


@pytest.mark.parametrize(
    ("missing", "before", "exponent"),
    [
        (0.1, 0.1, 0),
        (0.1 * math.exp(0.5), 0.1 * math.exp(0.5), 0.5),
        (0.1 * math.exp(-0.5), 0.1 * math.exp(-0.5), -0.5),
        (0.1 * math.exp(0.5), 0.1 * math.exp(0.6), 0.5 - 2 * 0.1),
        (0.1, 0.1 * math.exp(-0.3), 2 * 0.3),
        (0.9, 0.9, 1),
        (0.0, 0.0, -1),
        (-1e-7, 0.0, -1),
    ],
)
def test_size_of_a_change(missing: float, before: float, exponent: float) -> None:
    controller = GateMassController(target=0.9, rate=1.5, ahead=2, least=0.1, most=10)
    factor = controller.next_factor(2.0, 1 - missing, 1 - before)
    assert factor == pytest.approx(2 * 1.5**exponent)


@pytest.mark.parametrize("lag", [1, 20, 50], ids="lag={}".format)
@pytest.mark.parametrize("response", [0.5, 1.0], ids="response={}".format)
@pytest.mark.parametrize("natural", [0.98, 0.995], ids="from {}".format)
def test_settles_where_routing_answers_late(lag: int, response: float, natural: float) -> None:
    """What is missing falls with a power of the weight, and gets there over `lag` steps."""
    target = SparsityTarget(expert_top_k=1)
    wanted = ((1 - natural) / (1 - target.controller.target)) ** (1 / response)
    log_missing, factor, overshoot = math.log(1 - natural), 1.0, 0.0
    mass = natural
    for step in range(1, 2001):
        settled = math.log(1 - natural) - response * math.log(factor)
        log_missing += (settled - log_missing) / lag
        if step % target.every == 0:
            before, mass = mass, 1 - math.exp(log_missing)
            factor = target.controller.next_factor(factor, mass, before)
            overshoot = max(overshoot, math.log(factor / wanted) / math.log(wanted))
    assert factor == pytest.approx(wanted, rel=1e-3)
    assert overshoot < 0.05
