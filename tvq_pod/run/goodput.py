"""Counts where the time of a run goes, restarts included. Goodput is the share of the wall time since the first start
that was spent training steps that count.

At any time a session of the run is in exactly one of the kinds of goodput_table.py, and their seconds add up to the
wall time.

Process 0 counts, by its own clock, and status.json keeps the counts (see status.py): a session that is killed loses
what it counted since the file was last written, and the next session counts that time as `waiting`. Steps that were
lost in a kill before they were recorded count as `steps` when they are trained again.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax

from tvq_pod.run.goodput_table import (
    DATA,
    EVALUATION,
    KINDS,
    REPEATED,
    SAVES,
    START,
    STEPS,
    WAITING,
)

LOGGED = {DATA: "share_waiting_for_data", SAVES: "share_saving", EVALUATION: "share_evaluating"}  # in metrics.jsonl

T = TypeVar("T")


class Goodput:
    """Counts the seconds of one session, on top of those counted by earlier sessions."""

    def __init__(
        self,
        started_at: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ):
        """started_at: when this session began, in seconds since 1970; now if not given. clock: of durations. now: of
        dates, in seconds since 1970."""
        self._clock, self._now, self._lock = clock, now, threading.Lock()
        self._since = clock()  # all time before this is counted
        self.started_at = now() if started_at is None else started_at
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._seconds[START] = max(0.0, now() - self.started_at)
        self._kind = START
        self._first_start, self._starts = self.started_at, 1
        self._reached_before = self._reached = 0  # the last step trained, by earlier sessions and by all sessions
        self._logged: dict[str, float] = {}
        self._devices = _Busy(clock)

    # ------------------------------------------------------------------ what the session is doing

    def switch(self, kind: str) -> None:
        """Notes that from now on the session does something else: one of KINDS."""
        with self._lock:
            self._count()
            self._kind = kind

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as another kind. The block has this name in a trace."""
        before = self._kind
        self.switch(kind)
        try:
            with jax.profiler.TraceAnnotation(kind):
                yield
        finally:
            self.switch(before)

    def begin_step(self, step: int) -> None:
        """Call just before the step that makes `step` is dispatched. The host then waits for the previous step, so the
        time that follows belongs to that one."""
        runs = step - 1 if self._kind in (STEPS, REPEATED) else step
        self.switch(STEPS if runs > self._reached_before else REPEATED)
        self._reached = max(self._reached, runs - 1)

    def given(self, result: jax.Array) -> None:
        """Call when a step was dispatched. result: any array that the step returns."""
        self._devices.given(result)

    def end_steps(self, step: int, kind: str) -> None:
        """Call after `step`, the last one that the session trains, or the last before a rollback, after which steps up
        to it are trained again. kind: what the session does from now on."""
        self._reached = self._reached_before = max(self._reached, step)
        self.switch(kind)

    def fetched(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches. Time in which idle devices wait for one counts as `data`; while they are busy, no time is
        lost."""
        iterator = iter(batches)
        while True:
            began = self._clock()
            with jax.profiler.TraceAnnotation(DATA):
                batch = next(iterator, None)
            if batch is None:
                return
            idle_since = self._devices.idle_since()
            if idle_since is not None:
                with self._lock:
                    self._count()
                    waited = self._since - max(began, idle_since)
                    self._seconds[self._kind] -= waited
                    self._seconds[DATA] += waited
            yield batch

    def close(self) -> None:
        """Ends the thread that watches the devices."""
        self._devices.close()

    def _count(self) -> None:
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._since = now

    # ------------------------------------------------------------------ the counts

    def resume(self, record: Any) -> None:
        """Continues the counts of earlier sessions. record: what `record` returned in the last of them; anything else
        is treated as if there had been none."""
        with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError, OverflowError):
            seconds = {kind: float(record["seconds"].get(kind, 0.0)) for kind in KINDS}
            until, first_start = float(record["until"]), float(record["first_start"])
            starts, reached = int(record["starts"]), int(record["reached_step"])
            if not all(0 <= value < math.inf for value in (*seconds.values(), until, first_start, starts)):
                return
            with self._lock:
                for kind, before in seconds.items():
                    self._seconds[kind] += before
                self._seconds[WAITING] += max(0.0, self.started_at - until)
            self._first_start, self._starts = first_start, self._starts + starts
            self._reached_before, self._reached = reached, max(reached, self._reached)

    def record(self) -> dict[str, Any]:
        """The counts, for status.json: goodput, the share of `steps`; first_start and until, in seconds since 1970;
        starts, the number of sessions; reached_step, up to which steps are not new; seconds, by kind."""
        with self._lock:
            self._count()
            seconds = dict(self._seconds)
        return dict(
            goodput=round(seconds[STEPS] / max(sum(seconds.values()), 1e-9), 4),
            first_start=self._first_start,
            until=self._now(),
            starts=self._starts,
            reached_step=self._reached,
            seconds={kind: round(value, 3) for kind, value in seconds.items()},
        )

    def shares(self) -> dict[str, float]:
        """Shares of the time since the previous call, 0 .. 1, by the names of LOGGED, for a line of metrics."""
        with self._lock:
            self._count()
            seconds = self._seconds | {"all": sum(self._seconds.values())}
        before, self._logged = self._logged, seconds
        passed = max(seconds["all"] - before.get("all", 0.0), 1e-9)
        return {name: (seconds[kind] - before.get(kind, 0.0)) / passed for kind, name in LOGGED.items()}


class _Busy:
    """Tracks whether the devices are busy. A thread waits for them, so that no other code has to."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._changed = clock, threading.Condition()
        self._waiting: list[jax.Array] = []
        self._idle_since: float | None = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def given(self, result: jax.Array) -> None:
        with self._changed:
            if self._thread.ident is None and not self._closed:
                self._thread.start()
            self._waiting.append(result)
            self._idle_since = None
            self._changed.notify()

    def idle_since(self) -> float | None:
        """The time, by the clock, at which the devices finished all dispatched steps; None while they are busy."""
        with self._changed:
            return self._idle_since

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                result = self._waiting[0]
            with contextlib.suppress(Exception):  # the reader of the step's metrics gets the error
                jax.block_until_ready(result)
            with self._changed:
                del self._waiting[0], result
                if not self._waiting:
                    self._idle_since = self._clock()
