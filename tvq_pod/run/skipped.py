"""WORKDIR/skipped.jsonl: stretches of data that a run went back from and no longer reads, a line each.

A line is on disk before the run continues without its data, so a run that is killed and started again skips it too.
"""

import dataclasses
import json
import time

from etils import epath

from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole
from tvq_pod.parallel.processes import on_process_zero, text_from_process_zero


@dataclasses.dataclass(frozen=True)
class Skip:
    """A skipped stretch: `count` updates, from `update` on, of the streams of one phase (see Phase).

    data: the data of the phase; None: any, in lines of older versions."""

    first_step: int
    batch_size: int
    update_len: int
    update: int
    count: int
    data: str | None = None


class Skipped:
    """The stretches that a run has skipped so far: process 0's file, known to all processes."""

    def __init__(self, workdir: epath.Path):
        self.path = workdir / "skipped.jsonl"
        text = text_from_process_zero(self.path.read_text() if self.path.exists() else "")
        fields = [field.name for field in dataclasses.fields(Skip) if field.name != "data"]
        # A line without its end was truncated by a kill, before it had any effect.
        try:
            lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            self._skips = [Skip(**{name: int(line[name]) for name in fields}, data=line.get("data")) for line in lines]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"--workdir={workdir}: {self.path} is damaged, and lists the data to be left out; fix it by hand"
            ) from None

    def count(self) -> int:
        """The number of times that the run has gone back."""
        return len(self._skips)

    def put_into(self, schedule: DataSchedule) -> DataSchedule:
        """The schedule without the stretches of its streams that have been skipped."""
        phase = schedule.now
        for skip in self._skips:
            if (skip.first_step, skip.batch_size, skip.update_len) == (
                phase.first_step,
                phase.batch_size,
                phase.update_len,
            ) and skip.data in (None, phase.data):
                schedule = schedule.skipping(skip.update, skip.count)
        return schedule

    def add(self, skip: Skip, steps: tuple[int, int], back_to: int) -> None:
        """Adds a stretch. steps: the first and the last of the bad steps; back_to: the step that the run resumes
        from."""
        self._skips.append(skip)
        line = dataclasses.asdict(skip) | dict(bad_steps=list(steps), back_to=back_to, time=time.time())
        on_process_zero(lambda: self._append(json.dumps(line) + "\n"))

    def _append(self, line: str) -> None:
        text = self.path.read_text() if self.path.exists() else ""
        write_whole(self.path, text[: text.rfind("\n") + 1] + line, sync=True)
