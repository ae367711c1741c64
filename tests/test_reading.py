"""Parsed JSON against type annotations."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import pytest

from lightning_dsmoe.reading import Bounds, Count, ShortText, check_json, check_version, shown


class Point(NamedTuple):
    x: float
    label: str | None


@dataclass
class Record:
    size: Annotated[int, Bounds(1, 9)]
    kind: Literal["a", "b"] | None
    points: Annotated[list[Point | None], Bounds(0, 2)]
    pair: tuple[int, int] | None
    numbers: tuple[int, ...]
    flag: bool
    anything: dict[str, Any]


RECORD: dict[str, Any] = {
    "size": 9,
    "kind": "a",
    "points": [{"x": 1, "label": None}, None],
    "pair": [1, 2],
    "numbers": [1, 2, 3],
    "flag": True,
    "anything": {"deep": [{}]},
}


def test_data_of_a_kind_are_handed_on() -> None:
    assert check_json("it", RECORD, Record) is RECORD
    others = {"kind": None, "points": [], "pair": None, "numbers": []}
    check_json("it", RECORD | others, Record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "it: size must be an integer from 1 to 9, got 0"),
        ({"size": 10}, "it: size must be an integer from 1 to 9, got 10"),
        ({"size": True}, "it: size must be an integer from 1 to 9, got True"),
        ({"size": 2.0}, "it: size must be an integer from 1 to 9, got 2.0"),
        ({"size": None}, "it: size must be an integer from 1 to 9, got None"),
        ({"kind": "c"}, "it: kind must be null or a or b, got 'c'"),
        ({"kind": ["a"]}, "it: kind must be null or a or b, got ['a']"),
        ({"points": [None] * 3}, "it: points must be a list of length 0 to 2, got [None, None,"),
        ({"points": [{"x": 1}]}, "it, points[0] must have the fields x, label; missing or unknown"),
        ({"points": [None, 3]}, "it: points[1] must be null or an object, got 3"),
        (
            {"points": [{"x": float("nan"), "label": None}]},
            "it, points[0]: x must be a finite number, got nan",
        ),
        (
            {"points": [{"x": -(10**400), "label": None}]},
            "it, points[0]: x must be a finite number, got -1000",
        ),
        (
            {"points": [{"x": 1, "label": 2}]},
            "it, points[0]: label must be null or a string, got 2",
        ),
        ({"pair": [1]}, "it: pair must be null or a list of 2, got [1]"),
        ({"pair": [1, "2"]}, "it: pair[1] must be an integer, got '2'"),
        ({"numbers": [1, 2.5]}, "it: numbers[1] must be an integer, got 2.5"),
        ({"flag": 1}, "it: flag must be true or false, got 1"),
        ({"anything": []}, "it: anything must be an object, got []"),
        (
            {"more": 1},
            "it must have the fields size, kind, points, pair, numbers, flag, anything; ",
        ),
    ],
)
def test_other_data_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        check_json("it", RECORD | changes, Record)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", [None, [], 3, "text", True])
def test_something_else_than_an_object(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"^it must be an object, got"):
        check_json("it", wrong, {"size": Count})
    with pytest.raises(ValueError, match=r"^it must be an object with a format_version$"):
        check_version("it", wrong, 1)


def test_messages_stay_short() -> None:
    for data in ({"a" * 10**6: 1}, {"text": "x" * 10**6}, {"text": ["x"] * 10**6}):
        with pytest.raises(ValueError, match="text") as raised:
            check_json("it", data, {"text": ShortText})
        assert len(str(raised.value)) < 200


def test_values_are_shown_in_one_short_line() -> None:
    class Matrix:
        def __repr__(self) -> str:
            return "[[1,\n  2]]"

    assert shown(Matrix()) == "[[1, 2]]"
    assert shown("a\nb") == r"'a\nb'"
    for long in ("x" * 10**5, [["x" * 99] * 99] * 99, {"x" * 10**5: Matrix()}):
        assert len(shown(long)) <= 200
