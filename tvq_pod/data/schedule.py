"""Which update of which streams a step consumes: step n consumes update n of the first streams, unless the batch or the
data was changed or a stretch of data skipped. And where the contexts of the streams are cut.

A schedule is data: it goes into every checkpoint, and with (corpus, seed) it says what every step has read.
"""

import dataclasses
import functools
import itertools

from tvq_pod.config.context_schedule import Stage, stage_at, stages_of

# Versions of the order of documents (see order.py): GROUPED leaves a mixture listed, STRETCHED only a small one.
LISTED, GROUPED, STRETCHED = 1, 2, 3
NEWEST = STRETCHED


@dataclasses.dataclass(frozen=True)
class Phase:
    """A time in which the streams are the same."""

    first_step: int  # steps that were done before it
    batch_size: int
    update_len: int
    skips: tuple[tuple[int, int], ...] = ()  # (update, how many), in the order in which they were skipped
    contexts: tuple[tuple[int, str], ...] = ()  # (steps done before, the context schedule that holds from there on)
    data: str = ""  # fingerprint of other data that is read from here on; "": the same as in the phase before
    order: int = LISTED  # version of the order of documents

    def update(self, step: int) -> int:
        """The update of these streams that comes after `step` steps of the run."""
        update, skipped_to = step - self.first_step, 0
        for first, count in sorted(self.skips):
            begin, end = max(first, skipped_to), first + count  # stretches may overlap
            if update >= begin and end > begin:
                update += end - begin
            skipped_to = max(skipped_to, end)
        return update

    def cuts(self, step: int) -> int:
        """How many contexts of these streams have ended before the update that comes after `step` steps of the run.

        A context ends when it has the tokens that the schedule allows, counted in updates that steps have consumed, and
        where another stage begins. Lengths are multiples of update_len, so contexts end with an update. The number
        never decreases, and grows by one at most from step to step, whatever is skipped and however the schedule is
        changed.
        """
        stages = [stage for stage in self._stages if stage.first_step <= step]
        n_ended = 0
        for stage, following in itertools.pairwise(stages):
            n_ended += 1 + self._full_contexts(stage, following.first_step - stage.first_step - 1)
        return n_ended + self._full_contexts(stages[-1], step - stages[-1].first_step)

    def _full_contexts(self, stage: Stage, n_updates: int) -> int:
        """How many contexts of a stage are full after its first n_updates updates."""
        return n_updates * self.update_len // stage.length if stage.length else 0

    @functools.cached_property
    def _stages(self) -> list[Stage]:
        """The stages that held and will hold, of all schedules; the first begins with the phase. A change of the
        schedule that leaves the length of now as it was begins no new stage."""
        stages = [Stage(self.first_step, 0)]
        for since, text in self.contexts:
            stages = [stage for stage in stages if stage.first_step < since]
            asked = stage_at(text, since)
            if not stages or asked.first_step == since or asked.length != stages[-1].length:
                stages.append(Stage(since, asked.length))
            stages += [stage for stage in stages_of(text) if stage.first_step > since]
        return stages


@dataclasses.dataclass(frozen=True)
class DataSchedule:
    """The phases so far; the last one is being run."""

    phases: tuple[Phase, ...]

    @staticmethod
    def begin(batch_size: int, update_len: int) -> "DataSchedule":
        """Of a new run."""
        return DataSchedule((Phase(0, batch_size, update_len, order=NEWEST),))

    @staticmethod
    def from_json(phases: list[dict]) -> "DataSchedule":
        """What `to_json` gave. Older versions knew of no contexts, of no other data, and of fewer orders."""
        return DataSchedule(
            tuple(
                Phase(
                    phase["first_step"],
                    phase["batch_size"],
                    phase["update_len"],
                    tuple((update, count) for update, count in phase["skips"]),
                    tuple((step, text) for step, text in phase.get("contexts", [])),
                    phase.get("data", ""),
                    phase.get("order", LISTED),
                )
                for phase in phases
            )
        )

    def to_json(self) -> list[dict]:
        """As lists and dicts."""
        pairs = ("skips", "contexts")
        return [
            dataclasses.asdict(phase) | {name: [list(pair) for pair in getattr(phase, name)] for name in pairs}
            for phase in self.phases
        ]

    @property
    def now(self) -> Phase:
        """The phase that is being run."""
        return self.phases[-1]

    def tokens(self, step: int) -> int:
        """Tokens of all streams that the first `step` steps have consumed, those of bad steps among them."""
        ends = [*(phase.first_step for phase in self.phases[1:]), step]
        return sum(
            max(min(end, step) - phase.first_step, 0) * phase.batch_size * phase.update_len
            for phase, end in zip(self.phases, ends, strict=True)
        )

    def changed(self, step: int, batch_size: int, update_len: int, data: str = "") -> "DataSchedule":
        """With other streams from `step` on, and contexts without a limit. data: fingerprint of what they read, if that
        is another."""
        order = NEWEST if data else self.now.order
        return DataSchedule((*self.phases, Phase(step, batch_size, update_len, data=data, order=order)))

    def skipping(self, update: int, count: int) -> "DataSchedule":
        """Without `count` updates of the streams of now, from `update` on. Skipping them again changes nothing."""
        if (update, count) in self.now.skips:
            return self
        return self._with_now(skips=(*self.now.skips, (update, count)))

    def with_contexts(self, step: int, text: str) -> "DataSchedule":
        """With this context schedule from `step` on, in the same streams. See config/context_schedule.py."""
        before = tuple((since, schedule) for since, schedule in self.now.contexts if since < step)
        if text == (before[-1][1] if before else ""):
            return self._with_now(contexts=before)
        return self._with_now(contexts=(*before, (step, text)))

    def _with_now(self, **changes) -> "DataSchedule":
        return DataSchedule((*self.phases[:-1], dataclasses.replace(self.now, **changes)))
