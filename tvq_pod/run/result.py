"""The last line of --mode=train on stdout, for programs that start runs: `result: {json}`.

    ended           finished; preempted (saved after SIGTERM or SIGHUP); stopped (saved after SIGINT); failed
    exit_code       the process's exit code, and exit_status, the same in words
    first_step      the step that this start resumed from; step, the step that the run has reached; num_steps
    loss            loss of the last training line, in nats per token; bits_per_byte
    validation      the run's own last evaluation, as in its line in metrics.jsonl; null if there was none
    tokens          tokens that the run has consumed up to `step`, in all its starts together
    wall_seconds    duration of this start
    workdir

Process 0 prints it, also for a run that has nothing left to train, but not if the run is refused at its start. A
process that is ended at once (kill -9, a second signal, a deadline) prints none. Numbers that are not finite are null.
"""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import Preempted
from tvq_pod.host.terminal import OutputError
from tvq_pod.run.metrics import all_lines, finite, lines_of
from tvq_pod.run.preemption import PREEMPTED, Preemption
from tvq_pod.run.status import Status

LOGGED = ("loss", "bits_per_byte")


class RunResult(contextlib.AbstractContextManager):
    """Prints the line when a session ends. Enter it before everything else, so that it is the last to exit."""

    def __init__(self, workdir: epath.Path, num_steps: int, status: Status, preemption: Preemption, enabled: bool):
        """enabled: False on all processes but 0."""
        self._workdir, self._num_steps, self._status, self._enabled = workdir, num_steps, status, enabled
        self._preemption, self._began = preemption, time.monotonic()
        self._first_step: int | None = None
        self._schedule: Callable[[], DataSchedule] | None = None
        self._validation: dict | None = None

    def begin(self, first_step: int, schedule: Callable[[], DataSchedule], evaluated: dict[int, float | None]) -> None:
        """Call when the run can no longer be refused: from now on there is a result. schedule: returns the data
        schedule in use. evaluated: losses of the run's own evaluations so far, by step."""
        self._first_step, self._schedule = first_step, schedule
        if self._enabled and evaluated:
            newest = max(evaluated)
            with contextlib.suppress(Exception):  # a bucket that can't be reached
                for line in all_lines(self._workdir):
                    if (line["split"], line["step"], line.get("loss")) == ("validation", newest, evaluated[newest]):
                        self._validation = line

    def evaluated(self, step: int, numbers: dict) -> None:
        """Call when the run has evaluated its state at `step`."""
        self._validation = dict(step=step, **numbers)

    def __exit__(self, kind, error, trace):
        if not self._enabled or self._first_step is None:
            return
        assert self._schedule is not None, "begin was called"
        logged = self._status.values
        step = max(self._first_step, logged.get("step") or 0, logged.get("saved_step") or 0)
        numbers = {name: logged.get(name) for name in LOGGED}
        if None in numbers.values():  # nothing was logged in this session
            with contextlib.suppress(Exception):
                lines = lines_of(self._workdir, "train")
                newest = lines[max(at for at in lines if at <= step)]
                numbers = {name: newest.get(name) for name in LOGGED}
        validation = self._validation and {n: value for n, value in self._validation.items() if n != "split"}
        result = self._ending(kind, error) | dict(
            first_step=self._first_step,
            step=step,
            num_steps=self._num_steps,
            **numbers,
            validation=validation and {name: finite(value) for name, value in validation.items()},
            tokens=self._schedule().tokens(step),
            wall_seconds=round(time.monotonic() - self._began, 3),
            workdir=str(self._workdir),
        )
        with contextlib.suppress(OutputError):  # nobody reads it, and everything is saved
            print(f"result: {json.dumps(result)}", flush=True)

    def _ending(self, kind: type[BaseException] | None, error: BaseException | None) -> dict[str, Any]:
        if kind is None:
            return dict(ended="finished", exit_code=0, exit_status="done")
        if issubclass(kind, Preempted):
            ended = "stopped" if self._preemption.signal_name == "SIGINT" else "preempted"
            return dict(ended=ended, exit_code=PREEMPTED, exit_status="saved; run me again")
        why = " ".join(str(error).split())[:500] or kind.__name__
        return dict(ended="failed", exit_code=1, exit_status=why)
