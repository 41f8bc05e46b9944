"""Signals: when to save, and when to end.

SIGTERM (the machine is about to be taken back), SIGINT (Ctrl-C) and SIGHUP (the terminal is gone) ask the run to save
and end, within bounded time. SIGUSR1 asks it to save and continue. Signals that the process was started to ignore, as
nohup does with SIGHUP, stay ignored.

A thread reads signals from a pipe that Python's own handler writes to: the main thread may be inside a computation,
where Python code does not run.
"""

import os
import queue
import signal
import threading

from tvq_pod.host.terminal import tell

PREEMPTED = 75  # exit code: saved, run me again (EX_TEMPFAIL of sysexits.h)
SAVE, STOP = "save", "stop"  # what a signal asks for; stopping is saving and ending
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preemption:
    """Watches for signals from now on.

    Attributes: requested, whether the process was asked to stop; signal_name, the signal that asked, as "SIGTERM".

    Before `can_save` is set there is nothing to save: a request to stop ends the process at once, with exit code 75, or
    130 after SIGINT; a request to save is kept. After that, the run has grace_seconds to save and end by itself; when
    they are over, the process ends with exit code 1. A second request to stop ends it at once, with 128 + the signal's
    number.
    """

    signal_name = ""

    def __init__(self, grace_seconds: float = 120.0):
        """Must be called in the main thread. grace_seconds may be changed later."""
        self.grace_seconds = grace_seconds
        self.can_save = False
        self._stop, self._save = threading.Event(), threading.Event()
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (*STOPPING, signal.SIGUSR1):
            if number in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, lambda number, frame: None)  # so that the pipe is written to
            signal.siginterrupt(number, False)  # so that the reads of a run that continues are not interrupted
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    @property
    def requested(self) -> bool:
        return self._stop.is_set()

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        if not self._save.is_set():
            return False
        self._save.clear()
        return True

    def wait(self) -> str:
        """Waits for the next request, STOP or SAVE; each is returned once."""
        return self._requests.get()

    def _watch(self, reader: int) -> None:
        while True:
            (number,) = os.read(reader, 1)
            if number == signal.SIGUSR1:
                self._save.set()
                self._requests.put(SAVE)
                when = "now" if self.can_save else "as soon as there is something to save"
                tell(f"SIGUSR1: the run saves {when}, and continues")
            elif number in STOPPING:
                self._asked_to_stop(signal.Signals(number))

    def _asked_to_stop(self, number: signal.Signals) -> None:
        if not self.can_save:
            code = 128 + number if number == signal.SIGINT else PREEMPTED
            _end(f"{number.name}: the process ends; there is nothing to save", code)
        if self.requested:
            why = "the process ends without saving; the run can resume from its newest checkpoint, if it has one"
            _end(f"{number.name}, a second signal: {why}", 128 + number)
        self.signal_name = number.name
        self._stop.set()
        self._requests.put(STOP)
        timer = threading.Timer(self.grace_seconds, self._too_long, [number.name])
        timer.daemon = True
        timer.start()
        tell(f"{number.name}: the run saves a checkpoint and ends")

    def _too_long(self, name: str) -> None:
        _end(
            f"not saved within config.checkpoint.grace_seconds={self.grace_seconds:g} of {name} (another process of "
            "the job may be gone): the process ends without saving",
            1,
        )


def _end(why: str, code: int) -> None:
    tell(why)
    os._exit(code)
