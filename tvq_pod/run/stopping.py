"""Makes all processes save, or save and stop, at the same place after a signal to one of them.

They agree through jax's coordination service, not on the devices: votes that are counted on the devices are known only
once the steps in their queue are done.
"""

import contextlib
import itertools
import threading

import jax

from tvq_pod.host.terminal import tell
from tvq_pod.parallel import coordination
from tvq_pod.run.preemption import SAVE, STOP, Preemption

ASKED, PASSED, MET = "tvq_pod/stop/asked", "tvq_pod/stop/passed", "tvq_pod/stop/met"
NO_MORE = "no more"
HOUR_MS = 3_600_000


class StopTogether:
    """Finds the place to save or to stop once any process was asked to.

    All processes call `now` at the same places, in the same order. The process that was asked tells the others; then
    each pauses for the time of a message, says how many places it has passed, and all act at the first place that none
    has passed. There may be many requests, one round of messages after the other, until one is to stop.
    """

    def __init__(self, preemption: Preemption, timeout_seconds: float):
        """timeout_seconds: how long the others may take to answer; a process that is gone is noticed elsewhere."""
        self._preemption, self._timeout_ms = preemption, int(timeout_seconds * 1000)
        self._lock = threading.Lock()
        self._round = 0  # the round of messages that is being waited for
        self._passed = 0
        self._saves: set[int] = set()  # places to save at
        self._last: int | None = None  # the place to stop at
        self._client = coordination.client() if jax.process_count() > 1 else None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        if self._client:
            self._listener.start()
            threading.Thread(target=self._ask, daemon=True).start()

    def now(self) -> str | None:
        """Returns what to do at this place, the same on all processes: STOP, which is to save and end, SAVE, or
        None."""
        if not self._client:
            return STOP if self._preemption.requested else SAVE if self._preemption.take_save() else None
        with self._lock:
            place = self._passed
            if place == self._last:
                return STOP
            self._passed += 1
            return SAVE if place in self._saves else None

    def close(self) -> None:
        """Ends the threads. Call it once the last place is passed. A process that does not must end by os._exit: Python
        can't end a thread that waits inside jax without aborting."""
        if self._client:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, so there is nobody to tell
                self._say(NO_MORE)
            self._listener.join(timeout=10)

    @property
    def _others(self) -> coordination.Client:
        assert self._client is not None, "only a job of several processes asks"
        return self._client

    def _ask(self) -> None:
        while True:
            wanted = self._preemption.wait()
            with self._lock:
                is_due = wanted == SAVE and max(self._saves, default=-1) >= self._passed  # another was asked, too
            try:
                if not is_due:
                    self._say(wanted)
            except jax.errors.JaxRuntimeError as error:
                _say_no_agreement(error)

    def _say(self, wanted: str) -> None:
        """Tells all processes, in the first round in which no other process has said something else."""
        for number in itertools.count(self._round):
            key = f"{ASKED}/{number}"
            try:
                self._others.key_value_set(key, wanted)  # the first process to set the key is heard
                return
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise
            if self._others.blocking_key_value_get(key, self._timeout_ms) in (wanted, NO_MORE):
                return

    def _listen(self) -> None:
        while True:
            asked = self._asked()
            if asked == NO_MORE:
                return  # one process has passed the last place, so all must
            if asked is not None:
                self._agree(asked)
                self._round += 1
            if asked == STOP:
                return

    def _agree(self, asked: str) -> None:
        with self._lock:
            try:
                passed = f"{PASSED}/{self._round}"
                self._others.key_value_set(f"{passed}/{jax.process_index()}", str(self._passed))
                self._others.wait_at_barrier(f"{MET}/{self._round}", self._timeout_ms)
                place = max(int(places) for _, places in self._others.key_value_dir_get(passed))
                if asked == STOP:
                    self._last = place
                else:
                    self._saves.add(place)
            except jax.errors.JaxRuntimeError as error:
                _say_no_agreement(error)

    def _asked(self) -> str | None:
        """Waits for a request from any process, for an hour at most."""
        try:
            return self._others.blocking_key_value_get(f"{ASKED}/{self._round}", HOUR_MS)
        except jax.errors.JaxRuntimeError as error:
            return None if "DEADLINE_EXCEEDED" in str(error) else NO_MORE  # process 0 is gone, or the job is over


def _say_no_agreement(error: Exception) -> None:
    """Prints a warning. The run continues; a process that was asked to end does so when its grace period is over."""
    why = " ".join(str(error).split())[:200]
    tell(f"WARNING: the processes could not agree on where to save ({why})")
