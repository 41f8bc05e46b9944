"""The standard streams, which may be closed, full, or read by nobody any more.

What people read goes to stderr, and is not a reason to end: what stderr does not take is left out. Results go to
stdout, and a program whose results can't be written has failed: main ends it, with a line, or, where the reader of a
pipe has left (`| head -1`), quietly.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

_is_silent = False

PIPE_CLOSED = 128 + signal.SIGPIPE  # exit code; what a shell shows of a program that SIGPIPE has ended


class OutputError(Exception):
    """stdout can't be written; `__cause__` is the OSError. Not one itself: whoever expects files to fail must not take
    it for theirs."""


def prepare() -> None:
    """Makes both streams safe to write to. Call it before anything else is opened: a file that got the number of a
    closed stdout would be written over by whatever prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    out, err = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(out, io.TextIOWrapper):  # else a test has taken its place
        out.reconfigure(errors="replace")  # a terminal that can't show a character must not end a run
    sys.stdout, sys.stderr = _Stream(out, must_write=True), _Stream(err, must_write=False)


class _Stream:
    """A text stream whose errors are OutputErrors, or nobody's."""

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
    """Prints a line for people, to stderr. It is written in one piece, so lines of several threads do not mix. A
    terminal or log that is gone, or a full disk, is not a reason to end."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def say(line: str) -> None:
    """As `tell`, for what one process says for all: others than process 0 are silent (see `silence`)."""
    if not _is_silent:
        tell(line)


def silence() -> None:
    """From now on `say` prints nothing: this process is not process 0 of its job."""
    global _is_silent
    _is_silent = True
