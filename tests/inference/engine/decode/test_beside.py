"""Kernels that another process compiles, while this one goes on."""

import contextlib
import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.decode import beside, kernel_source
from lightning_dsmoe.inference.engine.decode.aot_cache import Part
from lightning_dsmoe.inference.engine.decode.compiled_step import NotReady, step_parts
from lightning_dsmoe.inference.engine.decode.kernel_source import KernelSource
from lightning_dsmoe.inference.engine.decode.same_graph import Layout
from lightning_dsmoe.inference.engine.decode.selection_inputs import NumberInput, with_inputs
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import Selection, TopK

from ..conftest import (
    SELECTIONS,
    V,
    assert_near,
    packed,
    rotary_mlp,
    token_by_token,
    uniform,
)

PLAN = uniform(TopK(2))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_running", None)


def text() -> Tensor:
    return torch.randint(V, (1, 12), generator=torch.Generator().manual_seed(8))


def part(module: nn.Module | None = None) -> Part:
    return Part(module or nn.Linear(3, 2), (torch.zeros(1, 3),), frozenset())


def finished(compilation: beside.Compilation) -> beside.Compilation:
    while compilation.is_running:
        time.sleep(0.02)
    return compilation


class Held:
    """Stands in for a compilation that ends when it is told to."""

    is_own = True

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.is_running = True
        self.error: Exception | None = None

    def kernels(self, parts: Any, what: str, device: torch.device) -> dict[object, Any]:
        if self.error is not None:
            raise self.error
        return {name: uncompiled(each.module, len(each.inputs)) for name, each in parts.items()}


def uncompiled(module: nn.Module, n_inputs: int) -> Any:
    """A kernel that runs a module with the weights that it is given."""
    names = [*dict(module.named_parameters()), *dict(module.named_buffers())]

    def kernel(tensors: list[Tensor]) -> list[Tensor]:
        inputs, weights = tensors[:n_inputs], tensors[n_inputs:]
        named = dict(zip(names, weights, strict=True))
        found = torch.func.functional_call(module, named, tuple(inputs))
        return list(found) if isinstance(found, tuple) else [found]

    return kernel


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Held]:
    started: list[Held] = []

    def start(parts: list[Part]) -> Held:
        started.append(Held(parts))
        return started[-1]

    monkeypatch.setattr(kernel_source, "start", start)
    monkeypatch.setattr(kernel_source, "is_at_work", lambda: False)
    return started


@torch.no_grad()
def test_text_is_uncompiled_until_the_kernels_are_there(held: list[Held]) -> None:
    engine, tokens_BT = Engine(packed(rotary_mlp()), SwitchPoints()), text()
    expected = token_by_token(rotary_mlp(), PLAN, tokens_BT, 4)
    reader = engine.open(1, 12, PLAN)
    reader.read(tokens_BT[:, :4])
    for at in range(4, 12):
        assert_near(reader.read(tokens_BT[:, at : at + 1]), expected[:, at], 3e-6)
        assert bool(engine._steps) == (at >= 8)
        if at == 7:
            held[0].is_running = False
        if at == 6:
            assert not pickle.loads(pickle.dumps(engine))._steps
            assert not copy.deepcopy(engine)._steps
    assert len(held) == 1


@torch.no_grad()
def test_another_number_of_experts_needs_no_new_kernel(held: list[Held]) -> None:
    engine, tokens_BT = Engine(packed(rotary_mlp()), SwitchPoints()), text()
    for k in (2, 3):
        plan = dataclasses.replace(PLAN, experts=TopK(k))
        if engine.ready_step(plan, 1) is None:
            held[0].is_running = False
        reader = engine.open(1, 12, plan)
        reader.read(tokens_BT[:, :4])
        found = torch.stack([reader.read(t_B1) for t_B1 in tokens_BT[:, 4:].split(1, 1)], 1)
        assert engine.ready_step(plan, 1) is not None
        assert_near(found, token_by_token(rotary_mlp(), plan, tokens_BT, 4)[:, 4:], 3e-6)
    assert len(held) == 1


def test_what_waits_needs_no_second_compilation(held: list[Held]) -> None:
    engine = Engine(packed(rotary_mlp()), SwitchPoints())
    assert engine.start_warm_up(PLAN, 1)
    engine.warm_up(PLAN, 1)
    assert engine.ready_step(PLAN, 1) is engine.compiled_step(PLAN, 1) is not None
    assert not engine.start_warm_up(PLAN, 1)
    assert not Engine(engine.decoder, SwitchPoints(gather_up_to=0)).start_warm_up(PLAN, 1)
    assert len(held) == 1


def test_a_compiler_that_fails_is_told_once(held: list[Held]) -> None:
    engine = Engine(packed(rotary_mlp()), SwitchPoints())
    assert engine.ready_step(PLAN, 1) is None
    held[0].error, held[0].is_running = RuntimeError("ended with status -9"), False
    with pytest.warns(UserWarning, match="uncompiled, more slowly: ended with status -9"):
        assert engine.ready_step(PLAN, 1) is None
    assert engine.ready_step(PLAN, 1) is None  # without another one
    assert len(held) == 1
    assert not engine.start_warm_up(PLAN, 1)
    assert engine.start_warm_up(PLAN, 2)  # which may go well
    assert len(held) == 2


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended with status -9, which too little memory"),
        ("raise SystemExit(3)", "the process that compiles ended with status 3"),
        ('print(\'{"error": "no compiler"}\')', "no compiler"),
    ],
)
def test_a_process_that_fails(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_PROGRAM", program.replace("{", "{{").replace("}", "}}"))
    compilation = finished(beside.Compilation([part()]))
    with pytest.raises(RuntimeError, match=said):
        compilation.kernels({"part": part()}, "a part", CPU)


def test_a_frozen_application_compiles_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(
        beside, "kernels_of", lambda parts, what, device: dict.fromkeys(parts, what)
    )
    compilation = beside.Compilation([part()])
    assert not compilation.is_running
    assert compilation.kernels({"part": part()}, "a part", CPU) == {"part": "a part"}


def test_one_process_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): "
    monkeypatch.setattr(beside, "_PROGRAM", wait + "time.sleep(0.02)")
    first = beside.start([part()])
    assert first is not None
    assert beside.is_at_work()
    assert beside.start([part()]) is None
    (tmp_path / "go").touch()
    finished(first)
    assert not beside.is_at_work()
    last = beside.start([part()])
    assert last is not None
    finished(last)


@pytest.mark.parametrize(
    ("n_threads", "at_work", "left"), [(4, True, 3), (4, False, 4), (2, True, 2), (1, True, 1)]
)
def test_a_core_is_left_to_the_compiler_where_threads_take_all(
    n_threads: int, at_work: bool, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(beside, "is_at_work", lambda: at_work)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with beside.leave_a_core():
            assert torch.get_num_threads() == left
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_compilations_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The thread that learns how the parent's ends is not in the forked process."""
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): "
    monkeypatch.setattr(beside, "_PROGRAM", wait + "time.sleep(0.02)")
    source, parts = KernelSource(), {"part": part()}

    def is_compiling() -> bool:
        with contextlib.suppress(NotReady):
            source.get("key", False, parts, "a part", CPU)
        return source.is_waiting("key")

    assert is_compiling()
    if (child := os.fork()) == 0:
        alone = not source.is_waiting("key") and not beside.is_at_work()
        os._exit(0 if alone and is_compiling() and source.is_waiting("key") else 1)
    _, status = os.waitpid(child, 0)
    assert source.is_waiting("key")
    (tmp_path / "go").touch()
    finished(source._beside["key"])
    assert os.waitstatus_to_exitcode(status) == 0


def test_other_processes_get_layouts_and_constants_alone() -> None:
    decoder = packed(rotary_mlp())
    with torch.no_grad():
        parts = list(step_parts(decoder, PLAN, 1).parts.values())
    parts[0].module.table = torch.tensor([5.0, 7.0])  # a constant of the graph
    packed_parts = beside.pack_parts(parts).task
    size = sum(tensor.nbytes for tensor in decoder.parameters())
    program = "import sys; from lightning_dsmoe.inference.engine.decode.packed_parts import *"
    program += "\n_, parts = unpack_parts(sys.stdin.buffer)\nprint(parts[0].module.table, "
    program += "[tuple(p.shape) for p in parts[1].module.parameters()])"
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, input=packed_parts, capture_output=True, check=True).stdout
    shapes = [tuple(p.shape) for p in parts[1].module.parameters()]
    assert out.decode().strip() == f"tensor([5., 7.]) {shapes}"
    assert len(packed_parts) < size


class Local(nn.Linear):
    pass


def test_code_of_the_main_program_is_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "kernels_of", lambda parts, *_: dict.fromkeys(parts, print))
    own = part(nn.Sequential(nn.Linear(3, 3), Local(3, 2)))
    monkeypatch.setattr(sys.modules["__main__"], "Local", Local, raising=False)
    monkeypatch.setattr(Local, "__module__", "__main__")
    hooked = part()
    hooked.module.register_forward_hook(lambda *_: None)  # cannot be pickled
    for each in (own, hooked):
        compilation = beside.Compilation([each])
        assert not compilation.is_running
        assert compilation.kernels({"part": each}, "a part", CPU) == {"part": print}


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_numbers_are_inputs(selection: Selection, n_tokens: int) -> None:
    found = with_inputs(selection, n_tokens)
    assert found.renormalize == selection.renormalize
    probs = torch.rand(n_tokens, 5, generator=torch.Generator().manual_seed(2)).softmax(-1)
    if isinstance(found, NumberInput):
        weight, active = found(probs)
        assert torch.equal(weight, selection(probs).weight)
        assert torch.equal(active, selection(probs).active)
        assert Layout.of(found.number).shape == ()


@pytest.mark.slow
@torch.no_grad()
def test_another_process_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = Part(nn.Linear(3, 2), (torch.ones(1, 3),), frozenset())
    monkeypatch.setenv("CXX", "no-such-compiler")
    failing = finished(beside.Compilation([own]))
    with pytest.raises(RuntimeError, match=r"(?i)compiler"):
        failing.kernels({"part": own}, "a part", CPU)
    folder = tmp_path / "lightning_dsmoe" / "kernels"
    assert list(folder.iterdir()) == []
    monkeypatch.delenv("CXX")
    both = [finished(each) for each in [beside.Compilation([own]), beside.Compilation([own])]]
    assert len(list(folder.glob("*.pt2"))) == 1
    assert KernelSource().get("key", False, {"part": own}, "a part", CPU)  # known by its name
    for compilation in both:
        kernel = compilation.kernels({"part": own}, "a part", CPU)["part"]
        (y,) = kernel([*own.inputs, *own.module.parameters()])
        assert_near(y, own.module(*own.inputs))
