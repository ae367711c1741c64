"""Which plans are worth having: the frontier of loss against active share, and its knee."""

from collections.abc import Sequence

Point = tuple[float, float]
"""Active share and loss."""


def frontier(points: Sequence[Point]) -> list[int]:
    """Numbers of the points that no other beats at both, by ascending share."""
    best: list[int] = []
    for number in sorted(range(len(points)), key=lambda n: points[n]):
        if not best or points[number][1] < points[best[-1]][1]:
            best.append(number)
    return best


def knee(points: Sequence[Point]) -> int:
    """Number of the point of the frontier where more experts stop paying.

    It is the point of the frontier farthest below the falling diagonal, both axes scaled to 1: the
    share from the least to the most of all points, the loss from the frontier's worst to its best
    (Satopaa et al. 2011, "Finding a Kneedle in a Haystack").

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("there is no knee without points")
    best = frontier(points)
    (left, top), (_, bottom) = points[best[0]], points[best[-1]]
    right = max(share for share, _ in points)

    def below(number: int) -> float:
        share, loss = points[number]
        across = (share - left) / (right - left or 1)
        down = (top - loss) / (top - bottom or 1)
        return down - across

    return max(best, key=below)
