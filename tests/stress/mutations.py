"""Seeded damage: to bytes as disks and attackers do it, to parsed JSON and checkpoints by field."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_DEEP: Any = 0
for _ in range(400):
    _DEEP = [_DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 255, 256, 4096, 4097, 2**24, 2**31, 2**53, 2**63, 10**30),
    *(-(2**63), 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "x" * 5000, "../../x", "/etc/passwd", "\0", "\ud800", "{}", "1", "é" * 300, "a\nb"),
    *("os.system", "builtins.eval", "lightning_dsmoe.TopK", "torch.nn.Linear", "__class__"),
    *([], {}, [[]], [None], [1] * 3000, {"": {}}, {"class_path": "os.system"}, {"a": 1}, _DEEP),
)
"""What stands in a field where something else is expected."""

_TEXT = tuple(
    value.encode()
    for value in ("[" * 100_000, '{"a":' * 20_000, "1" * 5000, "1e999999", "NaN", "\\ud800", "\0")
)
_RAW = (b"\xff" * 8, b"\0" * 64, b"\xff\xfe", b"\x80\x02", b"PK\3\4", b"PK\5\6", b"PK\6\7")


def mutated_bytes(whole: bytes, random: random.Random) -> bytes:
    """Bytes with one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        whole = _changed(whole, random)
    return whole


def _changed(whole: bytes, random: random.Random) -> bytes:
    changed = bytearray(whole)
    place = random.randrange(len(whole) + 1)
    # Headers and lists of contents are at both ends.
    if random.random() < 0.4:
        distance = min(len(whole), random.randrange(600))
        place = random.choice((distance, len(whole) - distance))
    stop = min(len(whole), place + random.choice((1, 2, 4, 8, 30, 500, 5000)))
    match random.randrange(9):
        case 0 | 1 if place < len(whole):
            changed[place] ^= 1 << random.randrange(8)
        case 2:
            del changed[place:]
        case 3:
            del changed[place:stop]
        case 4:
            changed[place:place] = changed[place:stop]
        case 5:
            changed[place:place] = random.randbytes(random.choice((1, 8, 200, 9000)))
        case 6:
            changed[place:stop] = random.randbytes(stop - place)
        case 7:
            value = random.choice(_TEXT + _RAW)
            changed[place : place + random.choice((0, len(value)))] = value
        case 8 if place < len(whole):
            changed[place] = random.choice(b"0129-.eE+[]{},:\"'\\ \n\0\xff")
    return bytes(changed)


def mutated_data(data: Any, random: random.Random) -> Any:
    """Parsed JSON, or what a checkpoint holds, with one to three fields changed."""
    root = [copy.deepcopy(data)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _change_field(root, random)
    return root[0]


def _change_field(root: list[Any], random: random.Random) -> None:
    fields = list(_fields(root))
    container, key = random.choice(fields)
    value = container[key]
    match random.randrange(8):
        case 0 if container is not root:
            del container[key]
        case 1 if isinstance(value, dict):
            value[random.choice(("surprise", "", "x" * 300, 3))] = random.choice(VALUES)
        case 2 if isinstance(value, list) and value:
            value += value[: random.choice((1, 2000))]
        case 3 if isinstance(container, dict):
            container[random.choice(("surprise", f"{key}s", 0))] = container.pop(key)
        case 4:
            other, its_key = random.choice(fields)
            container[key] = copy.deepcopy(other[its_key])
        case 5 if type(value) in (int, float):
            container[key] = random.choice((-value, value + 1, value * 2, value * 1000, str(value)))
        case 6 if isinstance(value, Tensor):
            container[key] = _changed_tensor(value, random)
        case _:
            container[key] = copy.deepcopy(random.choice(VALUES))


def _fields(container: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(container) if isinstance(container, dict) else range(len(container))
    for key in keys:
        yield container, key
        if isinstance(container[key], dict | list):
            yield from _fields(container[key])


def _changed_tensor(tensor: Tensor, random: random.Random) -> Tensor:
    kinds = (
        lambda: torch.full_like(tensor, random.choice((7, 0))),
        lambda: torch.full((), float("nan")).expand(tensor.shape),
        lambda: torch.zeros(1).expand(2**40),
        lambda: tensor.flatten()[:-1],
        lambda: tensor.bfloat16(),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.bool(),
        lambda: tensor[None],
        lambda: torch.zeros(tensor.shape, device="meta"),
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.zeros(0, 2**40),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    )
    return random.choice(kinds)()
