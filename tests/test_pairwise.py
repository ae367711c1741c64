from itertools import combinations, product

import pytest

from .pairwise import pairwise


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (5, 5, 4, 3), (10, 3, 2, 2, 2)], ids=str)
def test_any_two_values_of_two_parameters_meet(sizes: tuple[int, ...]) -> None:
    values = {f"p{i}": [f"{i}.{j}" for j in range(size)] for i, size in enumerate(sizes)}
    found = [parameters.values for parameters in pairwise(**values)]
    for first, second in combinations(range(len(sizes)), 2):
        expected = set(product(*list(values.values())[first : second + 1 : second - first]))
        assert {(row[first], row[second]) for row in found} == expected
    assert {row[0] for row in found} == set(values["p0"])
    assert len(found) <= 1.4 * sizes[0] * (max(sizes[1:]) if sizes[1:] else 1)


def test_the_same_every_time_and_readable() -> None:
    parameters = {"kind": ["float32", "int8"], "chosen": [None, [0, 2]], "make": [list, object()]}
    first, second = pairwise(**parameters), pairwise(**parameters)
    assert first == second
    assert first[0].id == "float32-None-list"
    assert {p.id.rpartition("-")[2] for p in first} == {"list", "make1"}
