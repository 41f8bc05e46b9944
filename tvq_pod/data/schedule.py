"""Which update of which streams a step consumes: step n consumes update n of the first streams, unless the batch was
changed or a stretch of data skipped.

A schedule is data: it goes into every checkpoint, and with (corpus, seed) it says what every step has read.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Phase:
    """A time in which the streams are the same."""

    first_step: int  # steps that were done before it
    batch_size: int
    update_len: int
    skips: tuple[tuple[int, int], ...] = ()  # (update, how many), in the order in which they were skipped

    def update(self, step: int) -> int:
        """The update of these streams that comes after `step` steps of the run."""
        update, skipped_to = step - self.first_step, 0
        for first, count in sorted(self.skips):
            begin, end = max(first, skipped_to), first + count  # stretches may overlap
            if update >= begin and end > begin:
                update += end - begin
            skipped_to = max(skipped_to, end)
        return update


@dataclasses.dataclass(frozen=True)
class DataSchedule:
    """The phases so far; the last one is being run."""

    phases: tuple[Phase, ...]

    @staticmethod
    def begin(batch_size: int, update_len: int) -> "DataSchedule":
        """Of a new run."""
        return DataSchedule((Phase(0, batch_size, update_len),))

    @staticmethod
    def from_json(phases: list[dict]) -> "DataSchedule":
        """What `to_json` gave."""
        return DataSchedule(
            tuple(
                Phase(
                    phase["first_step"],
                    phase["batch_size"],
                    phase["update_len"],
                    tuple((update, count) for update, count in phase["skips"]),
                )
                for phase in phases
            )
        )

    def to_json(self) -> list[dict]:
        """As lists and dicts."""
        return [dataclasses.asdict(phase) | dict(skips=[list(skip) for skip in phase.skips]) for phase in self.phases]

    @property
    def now(self) -> Phase:
        """The phase that is being run."""
        return self.phases[-1]

    def changed(self, step: int, batch_size: int, update_len: int) -> "DataSchedule":
        """With streams of another number or update length from `step` on."""
        return DataSchedule((*self.phases, Phase(step, batch_size, update_len)))

    def skipping(self, update: int, count: int) -> "DataSchedule":
        """Without `count` updates of the streams of now, from `update` on. Skipping them again changes nothing."""
        if (update, count) in self.now.skips:
            return self
        phase = dataclasses.replace(self.now, skips=(*self.now.skips, (update, count)))
        return DataSchedule((*self.phases[:-1], phase))
