"""Where one way of running experts gives way to the next, and measuring it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe import TopK, compile_sparse, load_sparse
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine import calibration
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, here, place_of

from .conftest import packed, uniform

PLAN = uniform(TopK(1))
SECONDS = {"gathered": 5.0, "grouped": 5.0, "masked": 5.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], float]:
    """Replace the work by seconds that tests choose for a way and a number of sequences."""
    chosen: dict[tuple[str, int], float] = {}
    now = [0.0]
    names = {(2**31, 1): "gathered", (0, 1): "grouped", (0, 2**31): "masked"}

    def step(engine: Engine, plan: Any, n_sequences: int) -> Any:
        name = names[engine.switch_points[:2]]

        def run() -> None:
            now[0] += chosen.get((name, n_sequences), SECONDS[name])

        return run

    monkeypatch.setattr(calibration, "_step", step)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    return chosen


@pytest.mark.parametrize(
    ("faster", "gather_up_to", "grouped_from"),
    [
        ({}, 64, 1),  # equal ones: the order in which they are preferred
        ({("grouped", 64): 4.0}, 32, 1),
        ({("masked", 16): 4.0, ("grouped", 64): 4.0}, 4, 17),
        ({("grouped", 1): 4.0}, 0, 1),
        ({("masked", n): 4.0 for n in (1, 4, 16, 32, 64)}, 0, 65),
        ({("masked", 1): 5.5, ("masked", 4): 4.5, ("gathered", 4): 4.0}, 64, 5),
    ],
)
def test_the_fastest_way_is_taken(
    faster: dict[tuple[str, int], float],
    gather_up_to: int,
    grouped_from: int,
    clock: dict[tuple[str, int], float],
    one_decoder: Decoder,
) -> None:
    clock.update(faster)
    twin = packed(one_decoder)
    found = calibration.calibrate(twin, PLAN)
    assert found == SwitchPoints(gather_up_to, grouped_from, place_of(twin))


def test_each_way_is_what_is_timed(one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []
    run_many = calibration.Engine.forward

    def forward(self: Engine, tokens: Tensor, *args: Any, **options: Any) -> Any:
        ways.append((self.switch_points[:2], tuple(tokens.shape)))
        return run_many(self, tokens, *args, **options)

    monkeypatch.setattr(calibration.Engine, "forward", forward)
    monkeypatch.setattr(calibration.Engine, "compiled_step", lambda *args: None)
    calibration.calibrate(packed(one_decoder), PLAN)
    for name in ((2**31, 1), (0, 1), (0, 2**31)):
        assert ways.count((name, (1, 8))) == 1
        assert ways.count((name, (1, 1))) == 18
        assert ways.count((name, (64, 8))) == (0 if name[0] else 1)


def test_a_model_keeps_what_it_has_measured(
    clock: dict[tuple[str, int], float], one_decoder: Decoder, tmp_path: Path
) -> None:
    clock[("grouped", 16)] = 4.0
    model = compile_sparse(one_decoder, PLAN)
    found = model.calibrate()
    assert found == model.switch_points == model.engine.switch_points
    assert found.gather_up_to == 4
    model.save(tmp_path / "model")
    loaded = load_sparse(tmp_path / "model")
    assert loaded.switch_points == found
    loaded.switch_points = SwitchPoints(2, 3)
    assert loaded.engine.switch_points == SwitchPoints(2, 3)


def test_elsewhere_the_defaults_hold(one_decoder: Decoder) -> None:
    twin = packed(one_decoder)
    measured = SwitchPoints(3, 5, place_of(twin))
    assert here(measured, twin) == measured
    assert here(SwitchPoints(3, 5), twin) == SwitchPoints(3, 5)
    assert here(SwitchPoints(3, 5, "a computer of long ago"), twin) == SwitchPoints()
    model = compile_sparse(one_decoder, PLAN, switch_points=measured)
    assert model.switch_points == measured
    assert model.double().switch_points == SwitchPoints()
    assert "float32" in place_of(twin)
    assert f"{torch.get_num_threads()} threads" in place_of(twin)
