import pytest

from lightning_dsmoe.analysis import frontier, knee


def test_the_frontier_leaves_out_what_is_beaten() -> None:
    points = [(0.5, 1.2), (0.2, 1.5), (0.3, 1.5), (1.0, 1.1), (0.6, 1.3), (0.5, 1.25)]
    assert frontier(points) == [1, 0, 3]
    assert frontier([]) == []
    assert frontier([(0.5, 1.0), (0.5, 1.0)]) == [0]


def test_the_knee_is_where_the_curve_bends() -> None:
    points = [(1.0, 1.0), (0.1, 2.0), (0.2, 1.05), (0.5, 1.02), (0.15, 1.6), (0.3, 1.9)]
    assert knee(points) == 2
    steep = [(0.145, 1.6267), (0.146, 1.6235), (0.147, 1.6224), (0.148, 1.6223), (1.0, 1.6225)]
    assert knee(steep) == 3
    assert knee([(0.4, 1.0)]) == 0
    assert knee([(0.4, 1.0), (0.5, 1.0)]) == 0
    with pytest.raises(ValueError, match="no knee without points"):
        knee([])
