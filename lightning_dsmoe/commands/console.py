"""Output for any console, and for a pipe that nobody reads to its end."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_SIGPIPE_EXIT_CODE = 141  # what a shell reports of a program that wrote to a closed pipe


@contextmanager
def console_output() -> Iterator[None]:
    """Print any character on any console, and end quietly if its reader is gone.

    A character that the console's encoding lacks is printed as a question mark. Where standard
    output or error is a pipe that was closed, as by `| head -1`, the program ends with code 141.
    A broken pipe of anything else, such as a logger's connection, stays an error.
    """
    is_closed = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error escapes anyway
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            is_closed = _has_no_reader(sys.stdout) or _has_no_reader(sys.stderr)
            _flush(sys.stdout)
            _flush(sys.stderr)
    except SystemExit as stop:
        # rich ends a program itself when it meets a closed pipe, with code 1.
        if isinstance(stop.__context__, BrokenPipeError):
            sys.exit(_SIGPIPE_EXIT_CODE)
        raise
    except BrokenPipeError:
        if not is_closed:
            raise
        sys.exit(_SIGPIPE_EXIT_CODE)


def _has_no_reader(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that was closed at its other end; Windows does not tell."""
    if not hasattr(select, "poll"):
        return True
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):  # no stream, closed here, or none of the system's
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush(stream: TextIO | None) -> None:
    """Write what is left in a buffer now: when Python shuts down, a failure prints a traceback."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        # What cannot be written stays in the buffer, and Python would try once more at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise
