import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dsmoe.schedules import LinearWarmupCosine

SMALL = settings(max_examples=40, deadline=None, derandomize=True)
RATE = 0.25


def start(max_steps: int, **options: float) -> tuple[torch.optim.Optimizer, LinearWarmupCosine]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    return optimizer, LinearWarmupCosine(optimizer, max_steps, **options)  # type: ignore[arg-type]


def rates(max_steps: int, steps: int, **options: float) -> list[float]:
    """Learning rates of the first steps."""
    optimizer, schedule = start(max_steps, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@SMALL
@given(
    max_steps=st.integers(1, 40),
    warmup=st.floats(0, 1, exclude_max=True),
    min_ratio=st.floats(0, 1),
)
def test_rises_to_the_full_rate_and_falls_to_its_share(
    max_steps: int, warmup: float, min_ratio: float
) -> None:
    warmup_steps = int(warmup * max_steps)
    found = rates(max_steps, max_steps + 5, warmup_steps=warmup_steps, min_ratio=min_ratio)
    rising, falling = found[:warmup_steps], found[warmup_steps:]
    assert rising == pytest.approx([RATE * (i + 1) / warmup_steps for i in range(warmup_steps)])
    assert falling[0] == pytest.approx(RATE)
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    assert found[max_steps:] == pytest.approx([min_ratio * RATE] * 5)


def test_is_a_cosine_after_the_warmup() -> None:
    found = rates(14, 15, warmup_steps=2, min_ratio=0.2)
    wave = [RATE * (0.2 + 0.4 * (1 + math.cos(math.pi * i / 12))) for i in range(13)]
    assert found[2:] == pytest.approx(wave)
    assert found[8] == pytest.approx(RATE * 0.6)


def test_defaults_fall_to_a_tenth_at_once() -> None:
    found = rates(10, 11)
    assert found[0] == RATE
    assert found[1] < RATE
    assert found[10] == pytest.approx(RATE / 10)


def test_every_group_keeps_its_own_full_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = LinearWarmupCosine(optimizer, 10, warmup_steps=4)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.25, 0.05])


def test_goes_on_from_its_state() -> None:
    optimizer, schedule = start(10, warmup_steps=3)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    later_optimizer, later = start(10, warmup_steps=3)
    later_optimizer.load_state_dict(optimizer.state_dict())
    later.load_state_dict(schedule.state_dict())
    for _ in range(4):
        for o, s in ((optimizer, schedule), (later_optimizer, later)):
            o.step()
            s.step()
        assert later.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 0},
        {"max_steps": 5, "warmup_steps": 5},
        {"max_steps": 5, "warmup_steps": -1},
        {"max_steps": 5, "min_ratio": -0.1},
        {"max_steps": 5, "min_ratio": 1.1},
        {"max_steps": 5, "min_ratio": math.nan},
    ],
)
def test_impossible_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 <= warmup_steps < max_steps and 0 <= min_ratio <= 1"):
        start(**options)  # type: ignore[arg-type]
