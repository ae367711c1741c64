"""Fewer combinations of parameters than all: most mistakes show with two values together."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

Combination = tuple[tuple[str, int], ...]
"""For each parameter, its name and which of its values it has."""


def pairwise(**values: Iterable[object]) -> list[Any]:
    """Combinations in which any two values of two parameters meet at least once.

    Takes the combination with the most pairs that have not met yet until all have: 30 rather than
    300 for sizes 5, 5, 4 and 3. Always the same for the same sizes.

        @pytest.mark.parametrize(("size", "dtype"), pairwise(size=[1, 2], dtype=[torch.float32]))
    """
    options = {name: list(some) for name, some in values.items()}
    every = list(product(*([(name, i) for i in range(len(o))] for name, o in options.items())))
    pairs = {combination: _pairs(combination) for combination in every}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda combination: len(pairs[combination] & missing)))
        missing -= pairs[chosen[-1]]
    return [
        pytest.param(
            *(options[name][i] for name, i in combination),
            id="-".join(_label(name, i, options[name][i]) for name, i in combination),
        )
        for combination in chosen
    ]


def _pairs(combination: Combination) -> frozenset[tuple[tuple[str, int], ...]]:
    return frozenset(combinations(combination, min(2, len(combination))))


def _label(name: str, index: int, value: object) -> str:
    text = str(getattr(value, "__name__", value))
    return text if len(text) <= 40 and "<" not in text else f"{name}{index}"
