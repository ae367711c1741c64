"""Gradients of two processes, which are to be those of one on the same sequences."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.quality.ranks import (
    CASES,
    PADDING,
    SIZES,
    STEPS,
    Case,
    Dealt,
    differences,
    gradients,
    gradients_of_rank,
    relative_difference,
)

from ..pairwise import pairwise
from ..ranks import on_two_ranks

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    # What the step under all experts, the first of two, logs; and data without workers.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

PAIRS = [
    Case(*some.values)
    for some in pairwise(
        strategy=("ddp", "fsdp2"), accumulated=(1, 3), padding=PADDING, sizes=SIZES
    )
]


class RunsOut(Dealt):
    """One batch less on the second rank."""

    def train_dataloader(self) -> DataLoader[Any]:
        batches = list(super().train_dataloader())
        assert self.trainer is not None
        return DataLoader(batches[self.trainer.global_rank :], batch_size=None)  # type: ignore[arg-type]


def run(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {**gradients_of_rank(rank, PAIRS)}
    with pytest.raises(ValueError, match="training batches") as error:
        gradients(CASES[0], 2, RunsOut)
    return {**found, "runs out": str(error.value)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(run, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def found(ranks: list[dict[str, Any]]) -> dict[tuple[Case, str], float]:
    return differences(ranks, PAIRS)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: "-".join(map(str, case)))
def test_two_ranks_have_the_gradients_of_one_process(
    case: Case, step: str, found: dict[tuple[Case, str], float]
) -> None:
    assert found[case, step] <= 1e-6


def test_a_rank_that_would_run_out_of_batches_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "1 training batches on rank 1 and 2 on rank 0" in rank["runs out"]


def test_each_case_is_among_those_that_are_printed() -> None:
    assert {*PAIRS} <= {*CASES}


def test_the_difference_is_relative_to_the_parameter() -> None:
    one = {"large": torch.tensor([100.0, 1.0]), "small": torch.tensor([0.1, 0.0])}
    two = {"large": torch.tensor([100.0, 2.0]), "small": torch.tensor([0.1, 0.002])}
    assert relative_difference(one, two) == pytest.approx(0.02)
