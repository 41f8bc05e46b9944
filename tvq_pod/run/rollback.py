"""Decides where a run resumes and what it reads from there: at a start and after bad steps, it continues from its
newest good checkpoint.

The data of bad steps is skipped: the data schedule, which says what each step reads, leaves it out.
"""

import dataclasses

from tvq_pod.config.identity import FINGERPRINT
from tvq_pod.config.settings import BadStepsSettings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.skipped import Skip, Skipped


@dataclasses.dataclass
class BadStretch(Exception):
    """Too many steps in a row were bad, so the run must go back."""

    last_step: int
    n_bad: int


def check_good(metrics: dict, step: int, settings: BadStepsSettings) -> None:
    """Waits for the step, and raises BadStretch if there are too many bad steps in a row. metrics: see
    `make_train_step`."""
    n_bad = int(metrics["n_bad"])
    if n_bad >= settings.rollback_after:
        raise BadStretch(step, n_bad)


class Rollback:
    """Finds the step to resume from, and the data schedule from there. All processes call the same methods in the same
    order."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        skipped: Skipped,
        train: TrainSettings,
        settings: BadStepsSettings,
        fingerprint: str = "",
    ):
        """fingerprint: the fingerprint of the data that the run reads now."""
        self._checkpoints, self._skipped, self._train, self._settings = checkpoints, skipped, train, settings
        self._fingerprint = fingerprint

    def check_belongs(self, step: int, record: dict) -> None:
        """Raises UserError if a checkpoint belongs to another run, or to other streams that may not start over.

        record: see `run_record`.
        """
        if self._train.on_data_change == "restart_streams":
            record = {name: value for name, value in record.items() if name != FINGERPRINT}
        self._checkpoints.check(step, record)
        if self._train.on_batch_change == "refuse":
            self._checkpoints.check_streams(step, self._train)

    def schedule_at(self, step: int | None) -> DataSchedule:
        """The data schedule that continues from a checkpoint, or for None from the beginning. It includes stretches
        that have been skipped since, and a change of the batch, of the data or of the context schedule."""
        sizes = self._train.batch_size, self._train.update_len
        if step is None:
            schedule = DataSchedule.begin(*sizes)
        else:
            schedule = self._checkpoints.schedule(step)
            data = self._other_data(step)
            if data or (schedule.now.batch_size, schedule.now.update_len) != sizes:
                schedule = schedule.changed(step, *sizes, data)
        return self._skipped.put_into(schedule.with_contexts(step or 0, self._train.context_schedule))

    def _other_data(self, step: int) -> str:
        """The fingerprint of the data that the run reads now, if it is not that of the checkpoint; else ""."""
        if self._train.on_data_change == "refuse":
            return ""
        return "" if self._checkpoints.record(step).get(FINGERPRINT) == self._fingerprint else self._fingerprint

    def go_back(self, bad: BadStretch, schedule: DataSchedule) -> int | None:
        """Finds the newest good step before a stretch of bad ones, None for the seed, and makes the run skip their data
        from now on.

        schedule: the one in use. Raises UserError if the run has already gone back as often as it may.
        """
        limit = self._settings.max_rollbacks
        before = bad.last_step - bad.n_bad
        if self._skipped.count() >= limit:
            raise UserError(
                f"config.bad_steps.max_rollbacks={limit}: steps {before + 1} to {bad.last_step} were bad, and the run "
                f"has already gone back this many times ({self._skipped.path} lists them); fix the data or the "
                "settings, or allow more"
            )
        self._checkpoints.wait()
        self._checkpoints.undo(after=before)
        step = self._checkpoints.newest_good()
        phase = schedule.now
        first, last = phase.update(before), phase.update(bad.last_step - 1)
        skip = Skip(phase.first_step, phase.batch_size, phase.update_len, first, last - first + 1, phase.data)
        self._skipped.add(skip, steps=(before + 1, bad.last_step), back_to=step or 0)
        say(
            f"BAD: steps {before + 1} to {bad.last_step} could not be applied; going back to step {step or 0} and "
            f"skipping updates {first} to {last} of every stream"
        )
        return step
