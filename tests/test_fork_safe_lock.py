"""A lock that a thread held when its process forked."""

import os
import threading

import pytest

from lightning_dsmoe.fork_safe_lock import ForkSafeLock


def test_one_at_a_time() -> None:
    lock = ForkSafeLock()
    with lock:
        assert not lock.acquire(blocking=False)
    assert lock.acquire()
    lock.release()
    with pytest.raises(RuntimeError):
        lock.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_finds_it_free() -> None:
    lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    if (child := os.fork()) == 0:
        os._exit(0 if lock.acquire(blocking=False) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
