"""Timing two things fairly on a machine that is not quiet."""

import math
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch


class Comparison(NamedTuple):
    """Seconds per call of two sides, medians over rounds, and their speed ratio.

    `ratio` is the median over rounds of reference / candidate: above 1, the candidate is faster.
    `spread` holds the quartiles of the rounds' ratios.
    """

    candidate: float
    reference: float
    ratio: float
    spread: tuple[float, float]


def compare(candidate: list[float], reference: list[float]) -> Comparison:
    """Compare two sides from their seconds in the same rounds."""
    ratios = sorted(r / c for c, r in zip(candidate, reference, strict=True))
    quarter = len(ratios) // 4
    return Comparison(
        median(candidate),
        median(reference),
        median(ratios),
        (ratios[quarter], ratios[-1 - quarter]),
    )


def interleave(
    candidate: Callable[[], object],
    reference: Callable[[], object],
    *,
    rounds: int,
    calls: int,
    warm_up: int = 2,
) -> Comparison:
    """Time blocks of calls of two sides in turn; which side goes first alternates.

    Args:
        candidate: one side.
        reference: the other side.
        rounds: rounds of one block of each side.
        calls: calls in a block.
        warm_up: calls of each side before the first round.
    """
    sides = (candidate, reference)
    for side in sides:
        seconds_per_call(side, warm_up)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds[which].append(seconds_per_call(sides[which], calls))
    return compare(*seconds)


def rounds_of(
    turns: Mapping[str, Callable[[], float]], *, rounds: int, until: float = math.inf
) -> dict[str, list[float]]:
    """Let sides take turns, in another order each round, after one round that does not count.

    Args:
        turns: of each side what takes a turn and gives its seconds.
        rounds: rounds that count.
        until: time by `time.monotonic()` after which no round begins but the first that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(1 + rounds):
        if number > 1 and time.monotonic() > until:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = turns[name]()
            if number:
                seconds[name].append(taken)
    return seconds


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Mean time of a few calls in a row, to the end of what they start on a GPU."""
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait_for_gpu()
    return (time.perf_counter() - start) / calls


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():  # otherwise there is nothing to wait for
        torch.cuda.synchronize()


def machine(device: torch.device | None = None) -> dict[str, str | int]:
    """What the numbers were measured on, and when; a GPU is told if it is the device."""
    on_gpu = device is not None and device.type == "cuda"
    gpu = {"gpu": torch.cuda.get_device_name(device)} if on_gpu else {}
    return {
        **gpu,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
