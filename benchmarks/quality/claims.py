"""The paper's claims, judged on what `reproduce.py` measured.

Every claim comes down to differences, one for each seed, that have to be below a limit. It `holds`
if they are in all seeds, `fails` if they are in none, and is `unclear` if seeds disagree or there
are fewer than two. Where a claim takes several such comparisons, it holds if all of them do, and
fails if one does.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.quality.comparisons import (
    Comparison,
    Runs,
    against,
    flatter,
    sparser,
    thresholds_against_top_k,
)
from benchmarks.quality.models import DENSE, DS_MOE, SAME_ACTIVE, SAME_TOTAL, SMALL_DENSE, TOP_1

CLOSE = 0.01
"""Relative difference of losses up to which two models are as good as each other."""
SAME = 0.001
"""The same for two plans of one model."""
QUALITY_AT = (0.3, 0.4)
"""Active shares at which DS-MoE is compared with the dense model."""
FLAT_AT = 0.2
"""Active share at which the loss is compared with that of all experts."""


class Claim(NamedTuple):
    """A claim, its rule, and the comparisons that it is judged by."""

    claim: str
    rule: str
    comparisons: Sequence[Comparison]

    @property
    def verdict(self) -> str:
        """`holds`, `fails` or `unclear`."""
        verdicts = [verdict(comparison) for comparison in self.comparisons]
        if "fails" in verdicts:
            return "fails"
        return "holds" if verdicts and set(verdicts) == {"holds"} else "unclear"


def judge(runs: Runs) -> list[Claim]:
    """All claims, on the runs that there are."""
    close, lower = f"loss less than {CLOSE:.0%} above", "lower loss"
    active = "with as many active parameters"
    return [
        *(
            Claim(
                f"1. With {share:.0%} active, DS-MoE is as good as the dense model",
                close,
                [against(runs, DENSE, share, limit=CLOSE)],
            )
            for share in QUALITY_AT
        ),
        Claim(
            f"2. DS-MoE is better than a sparsely trained model of the same total size {active}",
            lower,
            [against(runs, SAME_TOTAL)],
        ),
        Claim(
            "2. The same against one trained with one expert of each kind running",
            lower,
            [against(runs, TOP_1)],
        ),
        Claim(
            f"2. DS-MoE is as good as a sparsely trained model of a larger total size {active}",
            close,
            [against(runs, SAME_ACTIVE, limit=CLOSE)],
        ),
        Claim(
            f"2. DS-MoE is better than a dense model {active}",
            lower,
            [against(runs, SMALL_DENSE)],
        ),
        Claim(
            "3. Under one threshold, feed-forward experts are sparser than attention experts",
            "a smaller share runs, of all experts and of those beyond the one that always does",
            sparser(runs),
        ),
        Claim(
            f"4. A larger MI weight gives a flatter frontier, down to {FLAT_AT:.0%} active",
            "each step of the weight makes the loss rise less from all experts to that share",
            flatter(runs, FLAT_AT),
        ),
        *(
            Claim(
                f"5. Thresholds are as good as top-k at the same active share, {strength}",
                f"loss less than {SAME:.1%} above, at every share",
                thresholds_against_top_k(runs.get(model, {}), SAME),
            )
            for strength, model in DS_MOE.items()
        ),
    ]


def verdict(comparison: Comparison) -> str:
    """`holds`, `fails` or `unclear`."""
    below = [value < comparison.limit for value in comparison.differences.values()]
    if len(below) < 2 or any(below) != all(below):
        return "unclear"
    return "holds" if all(below) else "fails"
