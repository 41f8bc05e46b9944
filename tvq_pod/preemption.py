"""SIGTERM: the machine is about to be taken back. The first one asks the run to save and end, within bounded time.

A thread reads signals from a pipe that python's own handler writes to: the main thread may sit in a computation, where
python code does not run.
"""

import contextlib
import os
import signal
import sys
import threading

PREEMPTED = 75  # exit code: saved, run me again (EX_TEMPFAIL of sysexits.h)


class Preemption:
    """Watches for SIGTERM from now on.

    Attributes: requested, whether it has come. Before `can_save` is set there is nothing to save, and it ends the
    process at once, with exit code 75. After, the run has grace_seconds to save and end by itself; once they are over,
    or at a second SIGTERM, the process ends with exit code 1.
    """

    def __init__(self, grace_seconds: float):
        self._requested = threading.Event()
        self.can_save = False
        self._grace_seconds = grace_seconds
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # so that the pipe is written to
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def wait(self) -> None:
        """Until it has come."""
        self._requested.wait()

    def _watch(self, reader: int) -> None:
        while True:
            if signal.SIGTERM not in os.read(reader, 1):
                continue
            if not self.can_save:
                _end("SIGTERM before the first step, or after the last: there is nothing to save", PREEMPTED)
            if self.requested:
                _end("a second SIGTERM: ends without saving; the newest checkpoint is as it was", 1)
            self._requested.set()
            timer = threading.Timer(self._grace_seconds, self._too_long)
            timer.daemon = True
            timer.start()
            _tell("SIGTERM: saves and ends")

    def _too_long(self) -> None:
        _end(
            f"not saved within config.checkpoint.grace_seconds={self._grace_seconds:g} of SIGTERM (another process of "
            "the job may be gone): ends without",
            1,
        )


def _end(why: str, code: int) -> None:
    _tell(why)
    os._exit(code)


def _tell(line: str) -> None:
    """A terminal or a log that is gone, or a full disk, keeps nobody from ending."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
