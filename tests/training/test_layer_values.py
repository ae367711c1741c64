"""The largest values in layers, and which is the first that is not finite."""

import math

import torch
from torch import Tensor, nn

from lightning_dsmoe.training.layer_values import (
    by_layer,
    not_finite_names,
    of_gradients,
    record_outputs,
)


class Twice(nn.Module):
    """Calls a part twice, and divides by zero in between."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.divide = nn.Identity(), Divide()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.divide(self.part(x))
        return {"x": self.part(x)}


class Divide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.tensor([0.0, 1.0])


def test_outputs_of_all_kinds_in_the_order_in_which_they_stop_to_be_finite() -> None:
    model = nn.Sequential(nn.Identity(), Twice())
    with record_outputs(model) as largest:
        model(torch.tensor([-3.0, 2.0]))
    assert largest == {"0": 3.0, "1.divide": math.inf, "1.part": math.inf, "1": math.inf}
    assert not_finite_names(largest) == ["1.divide", "1.part", "1"]
    assert not model[0]._forward_hooks


def test_a_nan_is_larger_than_anything() -> None:
    model = nn.Identity()
    holder = nn.Sequential(model)
    with record_outputs(holder) as largest:
        holder(torch.tensor([math.nan, 5.0]))
        holder(torch.tensor([1.0]))
    assert math.isnan(largest["0"])


def test_compiled_parts_are_recorded_too() -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity()))
    model[0].compile(backend="eager")
    model(torch.ones(2))
    with record_outputs(model) as largest:
        model(torch.ones(2))
    assert largest == {"0.0": 1.0, "0": 1.0}


def test_gradients_of_parameters_that_have_one() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].weight.grad = torch.tensor([[-4.0]])
    model[1].weight.grad = torch.tensor([[math.inf]])
    assert of_gradients(model) == {"0.weight": 4.0, "1.weight": math.inf}


def test_numbered_layers_stand_side_by_side() -> None:
    largest = {
        "decoder.embedding": 1.0,
        "decoder.blocks.0.experts.0": 2.0,
        "decoder.blocks.0": math.nan,
        "decoder.blocks.1.norm": 3.0,
        "decoder.blocks.1": 2.0,
        "decoder": 9.0,
    }
    assert by_layer(largest) == "decoder.embedding 1, decoder.blocks nan 3"
    assert by_layer({"0": 1.0, "1": 2.0}) == "layers 1 2"
