"""Where one method of running experts gives way to the next, and measuring it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe import TopK, compile_sparse, load_sparse
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine import switch_points, tuning
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, here, place_of

from .conftest import learned_positions_glu, packed, rotary_mlp, uniform

PLAN = uniform(TopK(1))
METHODS = {(2**31, 1): "gathered", (0, 1): "grouped", (0, 2**31): "masked"}
SECONDS = {"gathered": 5.0, "grouped": 5.0, "masked": 5.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], float]:
    """Replace the work by seconds that tests choose for a method and a number of sequences."""
    chosen: dict[tuple[str, int], float] = {}

    def seconds(engine: Engine, plan: Any, n_sequences: int) -> float:
        name = METHODS[engine.switch_points[:2]]
        return chosen.get((name, n_sequences), SECONDS[name])

    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning.Engine, "compiled_step", lambda *args: "a step")
    return chosen


@pytest.mark.parametrize(
    ("faster", "gather_up_to", "grouped_from"),
    [
        ({}, 64, 1),  # equal ones: the order in which they are preferred
        ({("grouped", 64): 4.0}, 32, 1),
        ({("masked", 16): 4.0, ("grouped", 64): 4.0}, 4, 17),
        ({("grouped", 1): 4.0}, 0, 1),
        ({("masked", n): 4.0 for n in (1, 4, 16, 32, 64)}, 0, 65),
        ({("masked", 16): 4.9}, 4, 1),  # faster than grouped by chance alone
        ({("masked", 1): 5.5, ("masked", 4): 4.5, ("gathered", 4): 4.0}, 64, 5),
    ],
)
def test_the_fastest_method_is_taken(
    faster: dict[tuple[str, int], float],
    gather_up_to: int,
    grouped_from: int,
    clock: dict[tuple[str, int], float],
    one_decoder: Decoder,
) -> None:
    clock.update(faster)
    twin = packed(one_decoder)
    actual = tuning.tune(twin, PLAN)
    assert actual == SwitchPoints(gather_up_to, grouped_from, place_of(twin))


@pytest.mark.parametrize("make", [rotary_mlp, lambda: learned_positions_glu(max_positions=6)])
def test_each_method_is_what_is_timed(
    make: Callable[[], Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward, length = Engine.forward, make().max_positions or 8

    def recorded(self: Engine, tokens: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((METHODS[self.switch_points[:2]], tuple(tokens.shape)))
        return forward(self, tokens, *args, **options)

    def step(self: Engine, plan: Any, n_sequences: int) -> Any:
        def run(tokens: Tensor, cache: Any) -> Tensor:
            calls.append(("compiled", tuple(tokens.shape)))
            cache.next_slots()
            return torch.zeros(n_sequences, 1)

        run.n_sequences = n_sequences  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr(Engine, "forward", recorded)
    monkeypatch.setattr(Engine, "compiled_step", step)
    monkeypatch.setattr(Engine, "ready_step", step)
    tuning.tune(packed(make()), PLAN, batch_sizes=(1, 20))
    assert calls.count(("compiled", (1,))) == 6 * (length - 4)
    for size in (16, 4):
        assert calls.count(("compiled", (size,))) == 6 * (length - 4)
    for name in ("grouped", "masked"):
        assert calls.count((name, (20, 4))) == 6
        assert calls.count((name, (20, 1))) == 6 * (length - 4)


def test_a_model_of_few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "compiled_step", lambda *args: None)
    twin = packed(learned_positions_glu(max_positions=3))
    assert tuning.tune(twin, PLAN, batch_sizes=(1, 4)).gather_up_to == 0


def test_what_cannot_be_compiled_is_not_timed(
    one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def seconds(engine: Engine, *args: Any) -> float:
        timed.append(METHODS[engine.switch_points[:2]])
        return 1.0

    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(Engine, "compiled_step", lambda *args: None)
    assert tuning.tune(packed(one_decoder), PLAN).gather_up_to == 0
    assert set(timed) == {"grouped", "masked"}


def test_a_model_keeps_what_it_has_measured(
    clock: dict[tuple[str, int], float], one_decoder: Decoder, tmp_path: Path
) -> None:
    clock[("grouped", 16)] = 4.0
    model = compile_sparse(one_decoder, PLAN)
    found = model.tune()
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
    assert model.float().switch_points == measured
    assert model.to("meta").switch_points.gather_up_to == 0
    with pytest.raises(ValueError, match="switch points must be 0 or more"):
        model.switch_points = SwitchPoints(-1)
    assert "float32" in place_of(twin)
    assert f"{torch.get_num_threads()} threads" in place_of(twin)


@pytest.mark.parametrize(
    ("device", "points", "expected"),
    [
        ("cuda", SwitchPoints(), SwitchPoints(16)),
        ("cuda", SwitchPoints(3, 7), SwitchPoints(3, 7)),
        ("cuda", SwitchPoints(40, 7, "here"), SwitchPoints(40, 7, "here")),
        ("cuda", SwitchPoints(40, 7, "elsewhere"), SwitchPoints(16)),
        ("mps", SwitchPoints(40, 7, "here"), SwitchPoints(0, 7, "here")),
        ("cpu", SwitchPoints(), SwitchPoints()),
    ],
)
def test_what_holds_on_a_device(
    device: str,
    points: SwitchPoints,
    expected: SwitchPoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(switch_points, "place_of", lambda decoder: "here")
    weight = SimpleNamespace(device=torch.device(device))
    decoder: Any = SimpleNamespace(embedding=SimpleNamespace(weight=weight))
    assert here(points, decoder) == expected


@pytest.mark.parametrize(("device", "largest"), [("cpu", 64), ("cuda", 4096)])
def test_a_gpu_is_measured_with_more_sequences(
    device: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def medians(engines: Any, plan: Any, batch_size: int) -> dict[str, float]:
        timed.append(batch_size)
        return {name: float(name != "masked") for name in engines}

    points = SimpleNamespace(gather_up_to=0)
    monkeypatch.setattr(tuning, "Engine", lambda *args: SimpleNamespace(switch_points=points))
    monkeypatch.setattr(tuning, "_medians", medians)
    monkeypatch.setattr(tuning, "place_of", lambda decoder: "here")
    weight = SimpleNamespace(device=torch.device(device))
    decoder: Any = SimpleNamespace(embedding=SimpleNamespace(weight=weight))
    assert tuning.tune(decoder, PLAN) == SwitchPoints(0, largest + 1, "here")
    assert (timed[0], timed[-1]) == (1, largest)
