"""The standard streams, which may be closed or full, or whose reader may have left.

Messages go to stderr; those that stderr does not take are dropped, and the program continues. Results go to stdout, and
a program whose results can't be written has failed: main ends it, with a line, or quietly if the reader of a pipe has
left (`| head -1`).
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

_is_silent = False

PIPE_CLOSED = 128 + signal.SIGPIPE  # exit code, as a shell shows it for a program ended by SIGPIPE


class OutputError(Exception):
    """stdout can't be written; `__cause__` is the OSError. It is not an OSError itself, so that code that handles
    failing files does not catch it."""


def prepare() -> None:
    """Makes both streams safe to write to. Call it before anything else is opened: a file that got the descriptor of a
    closed stdout would be overwritten by prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    out, err = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(out, io.TextIOWrapper):  # otherwise a test has replaced it
        out.reconfigure(errors="replace")  # a terminal that can't show a character must not end a run
    sys.stdout, sys.stderr = _Stream(out, must_write=True), _Stream(err, must_write=False)


class _Stream:
    """A text stream whose errors become OutputErrors, or are dropped unless must_write."""

    def __init__(self, stream: TextIO, must_write: bool):
        self._stream, self._must_write = stream, must_write

    def write(self, text: str) -> int:
        with self._named_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._named_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._must_write:
                raise OutputError(error.strerror) from error

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def tell(line: str) -> None:
    """Prints a line to stderr. It is written in one piece, so lines from several threads do not mix. A closed terminal
    or a full disk does not end the program."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def say(line: str) -> None:
    """Prints a line as `tell` does, but only on process 0 (see `silence`)."""
    if not _is_silent:
        tell(line)


def silence() -> None:
    """Makes `say` print nothing from now on, since this process is not process 0 of its job."""
    global _is_silent
    _is_silent = True
