"""SIGTERM to one process, and all stop at the same place.

Asked over the network of jax's coordination service, beside the devices: a vote that is counted on them is known only
once the steps in their queue are done.
"""

import contextlib
import sys
import threading

import jax
from jax._src import distributed  # what multihost_utils is built on; jax has no public name for it

from tvq_pod.preemption import Preemption

ASKED, PASSED, MET = "tvq_pod/stop/asked", "tvq_pod/stop/passed", "tvq_pod/stop/met"
STOP, NO_MORE = "stop", "no more"
HOUR_MS = 3_600_000


class StopTogether:
    """Where to stop, once any process was asked to.

    All processes call `now` at the same places, in the same order. Whoever is asked tells the others; then each holds
    still for the time of a message, says how many places it has passed, and the first that nobody has passed is where
    all stop.
    """

    def __init__(self, preemption: Preemption, timeout_seconds: float):
        """timeout_seconds: for the others to say where they are; one that is gone is noticed elsewhere."""
        self._preemption, self._timeout_ms = preemption, int(timeout_seconds * 1000)
        self._lock = threading.Lock()
        self._passed, self._last = 0, None
        self._client = distributed.global_state.client if jax.process_count() > 1 else None
        self._listener = threading.Thread(target=self._agree, daemon=True)
        if self._client:
            self._listener.start()
            threading.Thread(target=self._ask, daemon=True).start()

    def now(self) -> bool:
        """Whether this is the place to stop at: on all processes or on none."""
        if not self._client:
            return self._preemption.requested
        with self._lock:
            if self._passed == self._last:
                return True
            self._passed += 1
            return False

    def close(self) -> None:
        """Once the last place is passed. A process that ends otherwise must end by os._exit: python can't end a thread
        that waits inside jax without aborting."""
        if self._client:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is done, and gone: nobody is to be told
                self._client.key_value_set(ASKED, NO_MORE, allow_overwrite=True)
            self._listener.join(timeout=10)

    def _ask(self) -> None:
        self._preemption.wait()
        try:
            self._client.key_value_set(ASKED, STOP, allow_overwrite=True)
        except jax.errors.JaxRuntimeError as error:
            _say_no_agreement(error)

    def _agree(self) -> None:
        while (asked := self._asked()) is None:
            pass
        if asked == NO_MORE:
            return  # one has passed the last place, and so must all
        with self._lock:
            try:
                self._client.key_value_set(f"{PASSED}/{jax.process_index()}", str(self._passed))
                self._client.wait_at_barrier(MET, self._timeout_ms)
                self._last = max(int(passed) for _, passed in self._client.key_value_dir_get(PASSED))
            except jax.errors.JaxRuntimeError as error:
                _say_no_agreement(error)

    def _asked(self) -> str | None:
        """Waits for what the others say, for an hour at most."""
        try:
            return self._client.blocking_key_value_get(ASKED, HOUR_MS)
        except jax.errors.JaxRuntimeError as error:
            return None if "DEADLINE_EXCEEDED" in str(error) else NO_MORE  # process 0 is gone, or the job over


def _say_no_agreement(error: Exception) -> None:
    """The run goes on; who was asked to end does so when its grace is over."""
    why = " ".join(str(error).split())[:200]
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(f"WARNING: the processes could not agree where to stop ({why})", file=sys.stderr, flush=True)
