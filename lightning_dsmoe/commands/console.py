"""Output for consoles of any encoding, for pipes that are closed early, and after Ctrl-C."""

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

_SIGINT_EXIT_CODE = 130
_WHOLE = "files are written whole or not at all"
_SIGPIPE_EXIT_CODE = 141  # what a shell reports of a program that wrote to a closed pipe


@contextmanager
def console_output() -> Iterator[None]:
    """Print any character on any console, and exit quietly when a pipe is closed.

    A character that the console's encoding lacks is printed as a question mark. If standard output
    or error is a closed pipe, as after `| head -1`, the program exits with code 141, as a shell
    reports SIGPIPE. A broken pipe of anything else, such as a logger's connection, stays an error.
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


@contextmanager
def kept_when_stopped(say: Callable[[], str]) -> Iterator[None]:
    """Let Ctrl-C say what is kept, which is only known when it is pressed."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(say())
        raise


def stop_quietly(stop: KeyboardInterrupt) -> NoReturn:
    """End the process after Ctrl-C with one line, and the exit code that a shell reports."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes of a run, only the first
        kept = "; ".join(getattr(stop, "__notes__", [])) or _WHOLE
        begin = "\n" if sys.stderr.isatty() else ""  # after ^C, and whatever was being written
        print(f"{begin}lightning-dsmoe: stopped by Ctrl-C; {kept}", file=sys.stderr)
    sys.exit(_SIGINT_EXIT_CODE)


def _has_no_reader(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that was closed at its other end; always True on Windows."""
    if not hasattr(select, "poll"):
        return True
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):  # no stream, closed here, or none of the system's
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush(stream: TextIO | None) -> None:
    """Flush a stream now, since a failure while Python shuts down prints a traceback."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        # The buffer keeps what could not be written, and Python tries once more when it shuts down.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise
