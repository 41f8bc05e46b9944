"""Decides when a run saves: at a fixed interval of steps, at the end, and when a signal asks. A save that fails is
tried again later.

All processes save at the same steps. All of them must know when a save failed on one, so they vote on that before every
step, and the votes are counted on the devices (see `Votes`); `StopTogether` makes them agree on requests by signals.
"""

import itertools
import time
from typing import NoReturn, Protocol

from tvq_pod.config.settings import CheckpointSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import Preempted, UserError
from tvq_pod.host.terminal import say
from tvq_pod.run.checkpoint import RETRY_SECONDS, Checkpoints
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.goodput_table import SAVES
from tvq_pod.run.saved_state import State

RETRIES = 30  # to write the last checkpoint
VOTES = ("save_failed", "save_busy")


class Counted(Protocol):
    """Votes with the names in VOTES; see parallel/processes.py."""

    def cast(self, **votes: bool) -> None: ...

    def result(self) -> dict[str, bool]: ...


class Saver:
    """Decides at each step whether it must be saved, and saves. All processes call the same methods in the same
    order."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        votes: Counted,
        settings: CheckpointSettings,
        record: dict,
        goodput: Goodput | None = None,
    ):
        """record: what the checkpoints belong to; see `run_record`. goodput: counts the time that saves take."""
        self._goodput = goodput or Goodput()
        self._checkpoints, self._votes, self._record = checkpoints, votes, record
        self._every_steps = settings.every_steps
        self._owed = False  # a checkpoint is due and was not begun
        self._failing = False  # the last one could not be written, and it is too early to try again
        self._schedule: DataSchedule | None = None

    def begin(self, schedule: DataSchedule) -> None:
        """Call when training begins, or begins again from an earlier step.

        schedule: the data schedule from there on; it goes into every checkpoint.
        """
        self._schedule, self._owed, self._failing = schedule, False, False

    @property
    def schedule(self) -> DataSchedule:
        """The data schedule in use."""
        assert self._schedule is not None, "begin was not called"
        return self._schedule

    def vote(self) -> None:
        """Casts this process's votes. Call before each step is dispatched."""
        self._votes.cast(save_failed=self._checkpoints.failing, save_busy=self._checkpoints.busy)

    def hear(self) -> None:
        """Takes in the votes of all processes. Call once after each `vote`."""
        told = self._votes.result()
        if told["save_failed"] and not self._failing:
            say(
                f"WARNING: a checkpoint could not be written ({self._checkpoints.error}): training continues, and "
                "tries again; earlier checkpoints are complete"
            )
        self._failing = told["save_failed"] or (self._failing and told["save_busy"])

    def is_due(self, step: int, metrics: dict, is_asked: bool) -> bool:
        """Whether the state after `step` must be saved. is_asked: whether a signal asked for it. If a save is due,
        waits for the step."""
        self._owed |= self._failing or is_asked or is_every(self._every_steps, step)
        # Nothing is saved between bad steps: the checkpoint that a run goes back to must be from before them.
        return self._owed and not self._failing and not int(metrics["n_bad"])

    def save(self, state: State, step: int, retain_all: bool = False) -> None:
        """Starts a save in the background. retain_all: deletes no older step."""
        with self._goodput.on(SAVES):
            self._checkpoints.wait()  # this one does not depend on whether the previous one could be written
            self._checkpoints.save(state, step, self._record, self.schedule, retain_all=retain_all)
        self._owed &= retain_all  # a save that keeps all older steps does not replace the one that is due

    def save_and_leave(self, state: State, step: int) -> NoReturn:
        """Saves, and raises Preempted, or UserError if the state could not be saved."""
        # This may be between bad steps: the earlier checkpoints, which the run may have to go back to, are kept.
        self.save(state, step, retain_all=True)
        if not self._wait_for_all():
            raise UserError(
                f"--workdir={self._checkpoints.path.parent}: asked to end, and step {step} could not be saved "
                f"({self._checkpoints.error}); the checkpoints before it are complete"
            )
        raise Preempted(f"saved step {step}; give the same command again to resume")

    def save_last(self, state: State, step: int, is_bad: bool) -> None:
        """Saves, and retries until the checkpoint is on disk. is_bad: the step was not applied, so older steps are
        kept.

        Raises UserError if it can't be written for minutes.
        """
        for attempt in itertools.count(1):
            self.save(state, step, retain_all=is_bad)
            if self._wait_for_all():
                return
            why = self._checkpoints.error or "another process reports why"
            if attempt == RETRIES:
                raise UserError(
                    f"--workdir={self._checkpoints.path.parent}: the last checkpoint can't be written ({why}); earlier "
                    "checkpoints are complete; make room and start again"
                )
            say(f"WARNING: the last checkpoint could not be written ({why}): trying again in {RETRY_SECONDS:g} s")
            with self._goodput.on(SAVES):
                time.sleep(RETRY_SECONDS)

    def _wait_for_all(self) -> bool:
        with self._goodput.on(SAVES):
            return self._checkpoints.wait_for_all()


def is_every(every: int, step: int) -> bool:
    """Whether something that is done every `every` steps is due at `step`; 0 is never."""
    return every > 0 and step % every == 0
