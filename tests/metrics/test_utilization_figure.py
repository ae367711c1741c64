from io import BytesIO

import matplotlib.image
import pytest
import torch

from lightning_dsmoe.metrics import Utilization, expert_utilization, utilization_figure


def used(*shares: float) -> Utilization:
    return expert_utilization(torch.tensor([shares]))


def test_a_heat_map_for_each_kind_with_routers() -> None:
    figure = utilization_figure(
        {
            "experts": [used(0.5, 0.5, 0.0, 0.0), None, used(0.4, 0.3, 0.3)],
            "attention": [used(0.9, 0.1)] * 3,
            "nothing": [None] * 3,
        },
        title="a title",
    )
    experts, attention, _ = figure.axes
    assert [axes.get_title() for axes in (experts, attention)] == ["experts", "attention"]
    cells = experts.images[0].get_array()
    assert cells is not None
    assert cells[0].tolist() == [2.0, 2.0, 0.0, 0.0]
    assert cells.shape == (3, 4)
    crosses = [c.get_offsets().tolist() for c in experts.collections if len(c.get_offsets())]
    assert crosses == [[[2.0, 0.0], [3.0, 0.0]]]
    assert {text.get_text() for text in experts.texts} == {"effective", "2.0", "3.0"}


def test_rows_have_the_names_of_layers() -> None:
    names = [f"encoder.blocks.{number}.feed_forward" for number in range(3)]
    kinds = {"experts": dict.fromkeys(names, used(0.9, 0.1)), "attention": {}}
    figure = utilization_figure(kinds)
    experts, _ = figure.axes
    assert [label.get_text() for label in experts.get_yticklabels()] == names
    figure.savefig(BytesIO(), format="png", dpi=50)  # a warning if the names leave no room


def test_drawn_pixels_show_use() -> None:
    def pixels(*shares: float) -> object:
        buffer = BytesIO()
        utilization_figure({"experts": [used(*shares)]}).savefig(buffer, format="png", dpi=50)
        buffer.seek(0)
        return matplotlib.image.imread(buffer).tolist()

    assert pixels(0.9, 0.1) != pixels(0.1, 0.9)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no layer has a router, so there are no gate shares"):
        utilization_figure({"experts": [None], "attention": [None]})
