"""Weights that are not finite are found in any type and any place."""

import pytest
import torch

from lightning_dsmoe.finite import check_finite, is_finite, not_finite, total_norm

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none(value: float, dtype: torch.dtype) -> None:
    for size, at in ((1, 0), (999, 0), (999, 500), (999, 998)):
        weight = torch.randn(size).to(dtype)
        check_finite({"first": torch.zeros(2), "weight": weight})
        weight[at] = value
        with pytest.raises(ValueError, match="weights are not finite: weight holds NaN or inf"):
            check_finite({"first": torch.zeros(2), "weight": weight})


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_and_other_types_are_finite(dtype: torch.dtype) -> None:
    largest = torch.full((3, 999), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"largest": largest, "least": -largest, "view": largest.mT, "none": largest[:0]})
    check_finite({"codes": torch.tensor([-128, 127], dtype=torch.int8), "mask": torch.ones(2) > 0})


def test_names_of_what_is_not_finite() -> None:
    tensors = {f"weight_{index}": torch.full((2, 3), 1e30) for index in range(6)}
    assert not_finite(tensors) == ""
    assert not is_finite(total_norm(tensors.values()))  # its squares overflow
    for index in (1, 2, 4, 5):
        tensors[f"weight_{index}"][1, 1] = float("nan") if index % 2 else -float("inf")
    assert not_finite(tensors) == "weight_1, weight_2, weight_4 and 1 more"
