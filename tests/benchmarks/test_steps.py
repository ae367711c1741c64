"""Times of compiled steps, here of parts that run uncompiled."""

from typing import Any

import pytest

from benchmarks.speed import first_tokens, padded
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine import engine as engine_module
from lightning_dsmoe.inference.engine.decode.compiled_step import NotReady
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import SelectionPlan, TopK

from ..inference.engine.conftest import Steps, V, packed, rotary_mlp

PLAN = SelectionPlan(TopK(2))


def uncompiled(decoder: Decoder, plan: SelectionPlan, n_sequences: int, **options: Any) -> Steps:
    steps = Steps(decoder, plan)
    steps.n_sequences = n_sequences
    return steps


def test_steps_that_are_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "CompiledStep", uncompiled)
    found = padded.measured(Engine(packed(rotary_mlp()), SwitchPoints()), PLAN, rounds=1)
    assert [*found][::6] == ["3 by 4", "12 by 8 and 4"]
    assert len(padded.table(found).splitlines()) == 4 + len(found)


def test_tokens_before_and_after_the_step_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([NotReady, NotReady, NotReady])

    def later(*args: Any, **options: Any) -> Steps:
        for error in waits:
            raise error
        return uncompiled(*args)

    monkeypatch.setattr(engine_module, "CompiledStep", later)
    monkeypatch.setattr(first_tokens, "VOCABULARY", V)
    monkeypatch.setattr(first_tokens, "LENGTH", 64)
    monkeypatch.setattr(first_tokens, "AFTER", 20)
    found = first_tokens.measured(Engine(packed(rotary_mlp()), SwitchPoints()), PLAN)
    assert [len(each) for each in (found.alone, found.meanwhile, found.compiled)] == [20, 3, 20]
    assert found.ready_after > 0
    assert first_tokens.line(found).splitlines()[-1].startswith("| 3 | ")
