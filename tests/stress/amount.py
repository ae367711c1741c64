"""How much of a stress test is run."""

import os

IS_LONG = os.environ.get("STRESS") == "long"
"""Set by `make stress`; other runs take a sample."""


def number(sample: int, of: int) -> int:
    """How many cases to run: a sample, or all of them."""
    return of if IS_LONG else sample
