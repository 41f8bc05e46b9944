"""Deadlines: no wait outside the train step lasts forever, whether it is for other processes or for storage.

Such a wait hangs inside jax, orbax or the kernel, and Python cannot interrupt it: no exception reaches it. But other
threads can run meanwhile. So a deadline is a thread that ends the process, with one line and exit code 1. Every process
has its own deadline for the same wait, so the process that hangs ends like those that wait for it. A process that is
frozen (SIGSTOP) ends when it runs again.
"""

import contextlib
import os
import threading
import time

import jax

from tvq_pod.host.terminal import tell
from tvq_pod.parallel import coordination

SIGNS = "tvq_pod/signs_of_life/"
SIGN_SECONDS = 5.0  # between two signs of life
LINGER_SECONDS = 3.0  # when a process has ended, jax ends the others before they can say what they waited for

_here = threading.local()  # .running: whether this thread has a deadline
_signs_given, _last_sign = 0, 0.0
_wait_seconds = 1800


class Deadline(contextlib.AbstractContextManager):
    """Ends the process if the block has not ended in time. Of nested deadlines in a thread, only the outermost
    counts."""

    def __init__(self, what: str, seconds: float, setting: str, of_first: bool = False):
        """what: what has to end, for the message. setting: where the time comes from, as NAME=VALUE. of_first: whether
        time counts from the last sign of life (`still_working`) of process 0, whose work may take long."""
        self._what, self._seconds, self._setting, self._of_first = what, seconds, setting, of_first
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []
        self._outermost = False

    def __enter__(self) -> "Deadline":
        self._outermost = not getattr(_here, "running", False)
        if self._outermost:
            _here.running = True
            self.renew()
            self._start(self._watch)
            if self._of_first:
                self._start(self._listen)
        return self

    def __exit__(self, *error) -> None:
        if self._outermost:
            _here.running = False
            self._done.set()
            for thread in self._threads:
                thread.join(timeout=10.0)

    def renew(self) -> None:
        """Restarts the time."""
        self._ends_at = time.monotonic() + self._seconds

    def _start(self, function) -> None:
        self._threads.append(threading.Thread(target=function, daemon=True))
        self._threads[-1].start()

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._ends_at - time.monotonic())):
            if time.monotonic() >= self._ends_at:
                self._end()

    def _listen(self) -> None:
        """Renews the deadline with each sign of life. It runs in its own thread, since it hangs if process 0 is
        frozen."""
        known = None
        while not self._done.wait(min(SIGN_SECONDS, self._seconds / 4)):
            signs = _signs()
            if signs != known:
                known = signs
                self.renew()

    def _end(self) -> None:
        tell(
            f"error: {self._setting}: {self._what} has not ended within {self._seconds:g} s; find the process, "
            "host or storage that hangs and start again, or allow more time"
        )
        if coordination.client():
            time.sleep(LINGER_SECONDS)
        os._exit(1)


def set_wait_timeout(seconds: int) -> None:
    """Sets --wait_timeout_seconds, for `waiting`."""
    global _wait_seconds
    _wait_seconds = seconds


def waiting(what: str, of_first: bool = False) -> contextlib.AbstractContextManager[Deadline]:
    """Returns a deadline of --wait_timeout_seconds for a block in which processes wait for each other. A job of one
    process has no such deadline."""
    deadline = Deadline(what, _wait_seconds, f"--wait_timeout_seconds={_wait_seconds}", of_first)
    return deadline if jax.process_count() > 1 else contextlib.nullcontext(deadline)


def still_working() -> None:
    """Signals from process 0 that the work that the others wait for makes progress. It can be called often."""
    global _signs_given, _last_sign
    if _signs_given and time.monotonic() < _last_sign + min(SIGN_SECONDS, _wait_seconds / 4):
        return
    _signs_given, _last_sign = _signs_given + 1, time.monotonic()
    client = coordination.client()
    if client and coordination.process_index() == 0:
        client.key_value_set(f"{SIGNS}0", str(_signs_given), allow_overwrite=True)


def _signs() -> str | int:
    """Returns the number of signs of life that process 0 has given, as far as this process knows."""
    client = coordination.client()
    if client is None or coordination.process_index() == 0:
        return _signs_given
    with contextlib.suppress(Exception):  # process 0 has ended or is out of reach: no new sign
        return dict(client.key_value_dir_get(SIGNS)).get(f"{SIGNS}0", "")
    return ""
