"""A lock of a module, in programs that fork."""

import os
import threading
from types import TracebackType


class ForkSafeLock:
    """A lock that is free in a forked process, where the thread that held it does not exist.

    A lock of `threading` that another thread holds at the moment of a fork stays locked in the new
    process for good.

    Examples:
        >>> from lightning_dsmoe.fork_safe_lock import ForkSafeLock
        >>> lock = ForkSafeLock()
        >>> with lock:
        ...     lock.acquire(blocking=False)
        False
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; whether it was taken, if not blocking."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
