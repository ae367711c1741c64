import os
import random
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported

import numpy as np
import pytest
import torch

from lightning_dsmoe.stacked import dispatch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # read when Triton is imported, which Inductor does as well
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords also hold names, such as that of the folder
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(1234)
    np.random.seed(1234)
    torch.manual_seed(1234)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of it; processes that run tests side by side share this one."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield


@pytest.fixture(params=["sorted", "masked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether mixtures sort tokens by expert or run all experts, whatever their size."""
    cost = 0.0 if request.param == "sorted" else float("inf")
    monkeypatch.setitem(dispatch.MULTIPLICATIONS_PER_KERNEL, "cpu", cost)
    name: str = request.param
    return name


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no switch points can be given: the engine has tests of its own for what it compiles."""
    engine = "lightning_dsmoe.inference.engine.engine.Engine"
    monkeypatch.setattr(f"{engine}.compiled_step", lambda *args: None)
    monkeypatch.setattr(f"{engine}.ready_step", lambda *args: None)


@pytest.fixture(autouse=True)
def poison_fresh_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make every read of memory that was never written visible as NaN.

    Deterministic mode fills what `torch.empty` and its relatives return. On CUDA it would also
    refuse kernels, so tests that need a device run without it.
    """
    torch.use_deterministic_algorithms(request.node.get_closest_marker("gpu") is None)
    yield
    torch.use_deterministic_algorithms(False)
