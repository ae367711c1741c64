"""Tracing and compiling in a process of its own, while this one goes on uncompiled.

A process and no thread: tracing swaps the parameters of modules that another thread may be running,
and a compiler written in C++ does not survive the end of the interpreter.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_dsmoe.fork_safe_lock import ForkSafeLock
from lightning_dsmoe.inference.engine.decode import kernel_index
from lightning_dsmoe.inference.engine.decode.aot_cache import (
    Kernel,
    Part,
    ensure_private_folder,
    kernel_folder,
    load_kernel,
)
from lightning_dsmoe.inference.engine.decode.compiled_step import (
    CannotCompile,
    compile_parts,
    compiling,
    kernels_of,
)
from lightning_dsmoe.inference.engine.decode.packed_parts import (
    CannotBePacked,
    pack_parts,
    unpack_parts,
)

# Lower priority before anything is imported, and the path of this process, to import the same.
_PROGRAM = "import os, sys; hasattr(os, 'nice') and os.nice({nice}); sys.path[:] = {path!r}; "
_PROGRAM += f"from {__name__} import answer; answer()"
_NICE = 5
_TURN = ForkSafeLock()
_running: "Compilation | None" = None  # one at a time: each takes a core and half a gigabyte


class Compilation:
    """Parts that a process of low priority compiles into the cache of kernels.

    It has a session of its own, so that Ctrl-C in a terminal does not reach it. If this process
    ends first, it finishes by itself, and the next one finds the kernels. What cannot be told to
    another process is compiled by `kernels`, in this one.

    Args:
        parts: the parts; several with equal graphs are compiled once.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._process = os.getpid()
        self._done = subprocess.CompletedProcess[bytes]([], returncode=-1, stdout=b"")
        self._thread: threading.Thread | None = None
        if not sys.executable or hasattr(sys, "frozen"):
            return  # no Python to start: it would be the application itself once more
        try:
            packed = pack_parts(parts)
        except CannotBePacked:
            return
        # The thread only waits, so that no finished process stays behind as a zombie.
        self._thread = threading.Thread(target=self._run, args=(packed.task,), daemon=True)
        self._thread.start()

    @property
    def is_own(self) -> bool:
        """Whether this process started it: a fork of that one never learns how it ends."""
        return self._process == os.getpid()

    @property
    def is_running(self) -> bool:
        """Whether another process is at work."""
        return self._thread is not None and self._thread.is_alive()

    def kernels(
        self, parts: dict[object, Part], what: str, device: torch.device
    ) -> dict[object, Kernel]:
        """Load the kernels of the parts, waiting for them; arguments as for `kernels_of`.

        Raises:
            RuntimeError: if the other process could not compile, or was ended.
        """
        if self._thread is None:
            return kernels_of(parts, what, device)
        self._thread.join()
        try:
            answer = json.loads(self._done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            status = self._done.returncode
            memory = ", which too little memory may be the reason for" if status == -9 else ""
            raise RuntimeError(
                f"the process that compiles ended with status {status}{memory}"
            ) from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        paths = [kernel_folder() / name for name in answer["kernels"]]
        loaded = {path: load_kernel(path, device) for path in dict.fromkeys(paths)}
        return {name: loaded[path] for name, path in zip(parts, paths, strict=True)}

    def _run(self, task: bytes) -> None:
        path = [each for each in sys.path if isinstance(each, str)]  # imports ignore all others
        program = _PROGRAM.format(nice=_NICE, path=path)
        try:
            self._done = subprocess.run(
                [sys.executable, "-c", program],
                input=task,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                check=False,
            )
        except OSError as error:
            self._done.stdout = json.dumps({"error": f"no process started: {error}"}).encode()


def is_at_work() -> bool:
    """Whether another process compiles for this one."""
    return _running is not None and _running.is_running


@contextmanager
def leave_a_core() -> Iterator[None]:
    """Compute with one thread less while another process compiles, where threads take all cores.

    Threads that wait for each other spin, so one that shares its core with the compiler holds up
    all of them: of two threads on two cores a token took 1,352 ms instead of 70.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1 or n_threads < (os.cpu_count() or 1) or not is_at_work():
        yield
        return
    torch.set_num_threads(n_threads - 1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def start(parts: Sequence[Part]) -> Compilation | None:
    """Start to compile parts in another process; None if this one has such a process already."""
    global _running
    with _TURN:
        if is_at_work():
            return None
        ensure_private_folder(kernel_folder())
        _running = Compilation(parts)
        return _running


def answer() -> None:
    """Compile what standard input says; a line of JSON says which files hold the kernels."""
    try:
        with compiling():
            name, parts = unpack_parts(sys.stdin.buffer)
            found: dict[str, Any] = {"kernels": [path.name for path in compile_parts(parts)]}
            if name is not None:
                kernel_index.keep(name, found["kernels"])
    except CannotCompile as error:
        found = {"error": str(error)}
    print("\n" + json.dumps(found), flush=True)
