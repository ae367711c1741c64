"""Limits of time and memory."""

import resource
import time
from collections.abc import Callable


def quickly(action: Callable[[], object]) -> None:
    """Run something in less than a second and 200 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        action()
    finally:
        assert time.process_time() - start < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
