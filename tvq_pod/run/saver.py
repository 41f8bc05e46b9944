"""When a run saves: every so many steps, at the end, and when a signal asks; again later, where the disk would not take
it.

All processes save at the same steps. What happens to one and must be known to all, that a save failed, is a vote before
every step, counted on the devices (see `Votes`); what a signal asks is agreed on by `StopTogether`.
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
    """Votes by the names of VOTES; see parallel/processes.py."""

    def cast(self, **votes: bool) -> None: ...

    def result(self) -> dict[str, bool]: ...


class Saver:
    """Says at each step whether it must be saved, and saves. All processes call the same methods in the same order."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        votes: Counted,
        settings: CheckpointSettings,
        record: dict,
        goodput: Goodput | None = None,
    ):
        """record: what the checkpoints belong to; see `run_record`. goodput: is told what time saves take."""
        self._goodput = goodput or Goodput()
        self._checkpoints, self._votes, self._record = checkpoints, votes, record
        self._every_steps = settings.every_steps
        self._owed = False  # a checkpoint is due, and was not begun
        self._failing = False  # it could not be written, and it is too early to try again
        self._schedule: DataSchedule | None = None

    def begin(self, schedule: DataSchedule) -> None:
        """Training begins, or begins again from an earlier step.

        schedule: the data schedule from there on; it goes into every checkpoint.
        """
        self._schedule, self._owed, self._failing = schedule, False, False

    @property
    def schedule(self) -> DataSchedule:
        """The data schedule in use."""
        assert self._schedule is not None, "begin was not called"
        return self._schedule

    def vote(self) -> None:
        """Call before each step is given to the devices."""
        self._votes.cast(save_failed=self._checkpoints.failing, save_busy=self._checkpoints.busy)

    def hear(self) -> None:
        """Call once after each `vote`: what all processes said."""
        told = self._votes.result()
        if told["save_failed"] and not self._failing:
            say(
                f"WARNING: a checkpoint could not be written ({self._checkpoints.error}): training continues, and "
                "tries again; those before it are complete"
            )
        self._failing = told["save_failed"] or (self._failing and told["save_busy"])

    def is_due(self, step: int, metrics: dict, is_asked: bool) -> bool:
        """Whether the state after `step` must be saved. is_asked: by a signal. Waits for the step if it is to be."""
        self._owed |= self._failing or is_asked or is_every(self._every_steps, step)
        # Between bad steps nothing is saved: what a run can go back to must be from before them.
        return self._owed and not self._failing and not int(metrics["n_bad"])

    def save(self, state: State, step: int, retain_all: bool = False) -> None:
        """Begins to save, in the background. retain_all: deletes no older step."""
        with self._goodput.on(SAVES):
            self._checkpoints.wait()  # whether the one before could be written makes no difference to this one
            self._checkpoints.save(state, step, self._record, self.schedule, retain_all=retain_all)
        self._owed &= retain_all  # one that was asked for in passing does not stand for the one that is due

    def save_and_leave(self, state: State, step: int) -> NoReturn:
        """Saves, and raises Preempted; UserError if the state could not be saved."""
        # It may be between bad steps: those of before, which the run may have to go back to, stay.
        self.save(state, step, retain_all=True)
        if not self._wait_for_all():
            raise UserError(
                f"--workdir={self._checkpoints.path.parent}: asked to end, and step {step} could not be saved "
                f"({self._checkpoints.error}); the checkpoints before it are complete"
            )
        raise Preempted(f"saved step {step}; give the same command again to resume")

    def save_last(self, state: State, step: int, is_bad: bool) -> None:
        """Saves, until the checkpoint is on disk. is_bad: the step was not applied, so older steps stay.

        Raises UserError if it can't be written for minutes.
        """
        for attempt in itertools.count(1):
            self.save(state, step, retain_all=is_bad)
            if self._wait_for_all():
                return
            why = self._checkpoints.error or "another process says why"
            if attempt == RETRIES:
                raise UserError(
                    f"--workdir={self._checkpoints.path.parent}: the last checkpoint can't be written ({why}); those "
                    "before it are complete; make room and start again"
                )
            say(f"WARNING: the last checkpoint could not be written ({why}): trying again in {RETRY_SECONDS:g} s")
            with self._goodput.on(SAVES):
                time.sleep(RETRY_SECONDS)

    def _wait_for_all(self) -> bool:
        with self._goodput.on(SAVES):
            return self._checkpoints.wait_for_all()


def is_every(every: int, step: int) -> bool:
    """Whether something is due at `step` that is done every so many steps; 0 is never."""
    return every > 0 and step % every == 0
