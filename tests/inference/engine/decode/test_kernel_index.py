"""Kernels of parts that were met before."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dsmoe.inference.engine.decode import kernel_index, kernel_source, packed_parts
from lightning_dsmoe.inference.engine.decode.aot_cache import (
    Part,
    ensure_private_folder,
    kernel_folder,
)
from lightning_dsmoe.inference.engine.decode.compiled_step import step_parts
from lightning_dsmoe.inference.engine.decode.kernel_source import KernelSource
from lightning_dsmoe.routing import (
    AllExperts,
    Selection,
    SelectionPlan,
    Threshold,
    TopK,
    TopP,
)

from ..conftest import packed, rotary_mlp

FILE = f"{'0' * 40}.pt2"


class Own(nn.Linear):
    """Of a package that may change without its name."""


def parts_of(module: nn.Module) -> list[Part]:
    return [Part(module, (torch.zeros(1, 3),), frozenset())]


def name_of(module: nn.Module) -> str | None:
    return kernel_index.name_of(parts_of(module))


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were loaded as kernels; what is called wrong is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ensure_private_folder(kernel_folder())
    found: list[str] = []

    def load(path: Path, device: torch.device) -> Any:
        if not path.is_file():
            raise ValueError("damaged")
        found.append(path.name)
        return path.name

    monkeypatch.setattr(kernel_index, "load_kernel", load)
    return found


def test_a_name_is_that_of_layouts_options_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_of(nn.Linear(3, 2))
    assert name is not None
    assert name_of(nn.Linear(3, 2)) == name  # other values
    others = [nn.Linear(3, 4), nn.Linear(3, 2, bias=False), nn.Linear(3, 2).bfloat16()]
    names = [name_of(each) for each in others]
    monkeypatch.setattr(packed_parts, "_own_code", lambda: "changed")
    assert len({name, *names, name_of(nn.Linear(3, 2))}) == 5
    assert name_of(Own(3, 2)) is None
    assert name_of(nn.Sequential(nn.Linear(3, 3), Own(3, 2))) is None
    hooked = nn.Linear(3, 2)
    hooked.register_forward_hook(lambda *_: None)  # cannot be pickled
    assert name_of(hooked) is None


@torch.no_grad()
def step_of(plan: SelectionPlan, n_sequences: int) -> list[Part]:
    return list(step_parts(packed(rotary_mlp()), plan, n_sequences).parts.values())


@pytest.mark.parametrize("n_sequences", [1, 2])
def test_a_step_has_the_same_name_for_every_k_in_every_model_alike(n_sequences: int) -> None:
    def name(selection: Selection, **others: Selection) -> str | None:
        return kernel_index.name_of(step_of(SelectionPlan(selection, **others), n_sequences))

    of_k = name(TopK(2), attention=TopK(2))
    assert of_k is not None
    assert of_k == name(TopK(2), attention=TopK(2))
    assert of_k == name(TopK(4), attention=TopK(3))
    assert name(Threshold(0.3)) == name(Threshold(0.8))
    assert name(TopP(0.3)) == name(TopP(0.8))
    alike = {of_k, name(TopK(2)), name(Threshold(0.3)), name(TopP(0.3)), name(AllExperts())}
    assert len({*alike, name(TopK(2, renormalize=True))}) == 6


def test_another_process_gets_the_k_of_the_plan() -> None:
    for k in (2, 4):
        task_of_k = packed_parts.pack_parts(step_of(SelectionPlan(TopK(k)), 1))
        name, parts = packed_parts.unpack_parts(io.BytesIO(task_of_k.task))
        assert name == task_of_k.name
        assert [len(each.module.experts.slots_K) for each in parts[1:2]] == [k]


def test_remembered_kernels_need_no_compilation(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*args: Any) -> Any:
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(kernel_source, "start", compiled)
    monkeypatch.setattr(kernel_source, "kernels_of", compiled)
    parts = parts_of(nn.Linear(3, 2))
    (kernel_folder() / FILE).touch()
    kernel_index.keep(str(kernel_index.name_of(parts)), [FILE])
    for wait in (True, False):
        named: dict[object, Part] = {"part": parts[0]}
        found = KernelSource().get("key", wait, named, "a part", torch.device("cpu"))
        assert found == {"part": FILE}
    assert loaded == [FILE, FILE]


@pytest.mark.parametrize(
    "written",
    [
        json.dumps([FILE.replace("0", "1")]),  # gone
        json.dumps([f"../{FILE}"]),
        json.dumps([FILE, FILE]),
        json.dumps({"a": 1}),
        json.dumps([3]),
        "[",
    ],
)
def test_what_is_damaged_is_compiled_anew(loaded: list[str], written: str) -> None:
    parts = parts_of(nn.Linear(3, 2))
    (kernel_folder() / FILE).touch()
    (kernel_folder().parent / FILE).touch()
    assert kernel_index.recall(parts) is None
    path = kernel_folder() / f"{kernel_index.name_of(parts)}.json"
    path.write_text(written)
    assert kernel_index.recall(parts) is None
    assert not loaded


def test_what_others_could_write_is_not_believed(loaded: list[str]) -> None:
    parts = parts_of(nn.Linear(3, 2))
    (kernel_folder() / FILE).touch()
    kernel_index.keep(str(kernel_index.name_of(parts)), [FILE])
    path = kernel_folder() / f"{kernel_index.name_of(parts)}.json"
    path.chmod(0o666)
    assert kernel_index.recall(parts) is None
    path.chmod(0o600)
    assert kernel_index.recall(parts) == [FILE]
    kernel_folder().chmod(0o770)  # others could put a file of ours in the place of another
    assert kernel_index.recall(parts) is None
    kernel_folder().chmod(0o700)


def test_what_is_remembered_is_found_whatever_the_umask(loaded: list[str]) -> None:
    parts = parts_of(nn.Linear(3, 2))
    (kernel_folder() / FILE).touch()
    before = os.umask(0o002)
    try:
        kernel_index.keep(str(kernel_index.name_of(parts)), [FILE])
    finally:
        os.umask(before)
    assert kernel_index.recall(parts) == [FILE]


def test_kernels_are_used_where_nothing_can_be_remembered(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(kernel_index, "atomic_path", full)
    kernel_index.keep("name", [FILE])
    assert not list(kernel_folder().iterdir())
