"""The streams that a run reads, after all that has changed since it began: its batch, its data, the weights of its
mixture.

    another batch       what is left of the epoch is laid end to end and cut into the new rows (TrainStreams.recut)
    other data          streams that have read nothing
    other weights       in the middle of the streams: new epochs begin there, in the same rows

Streams that begin because of other data or weights draw the order of documents anew: they begin with an epoch of a
number that no streams before have come to. So what was read before and what is read now are independent draws.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

from tvq_pod.data.order import GroupedOrder, ListedOrder, Order
from tvq_pod.data.schedule import LISTED, STRETCHED, DataSchedule, Phase
from tvq_pod.data.store import Part, Split
from tvq_pod.data.streams import Segment, TrainStreams
from tvq_pod.data.stretches import StretchedStreams

EPOCHS_APART = 100  # the first epochs of streams whose order of documents must not be the same
MOST_LISTED = 2**20  # documents of a mixture whose order is a list of all, in version 3
MOST_CHANGES = 64  # of weights, whose streams have first epochs of their own; later ones begin like earlier ones


class StagedStreams:
    """The plan of training where weights change on the way: the tokens of each row are those of one plan after the
    other. See `Plan`."""

    def __init__(self, stages: Sequence[tuple[int, TrainStreams | StretchedStreams]]):
        """stages: for each plan the place in every row where it begins; the first begins at 0."""
        self._firsts = [first for first, _ in stages]
        self._streams = [streams for _, streams in stages]
        self._documents_before = functools.cache(self._count_documents_before)

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """See Plan. Document ids count on from plan to plan."""
        for index, streams in enumerate(self._streams):
            first, stop = self._firsts[index], self._firsts[index + 1] if index + 1 < len(self._firsts) else end
            low, high = max(begin, first), min(end, stop)
            if low >= high:
                continue
            before, segments = self._documents_before(index, row), streams.segments(row, low - first, high - first)
            if not before:
                yield from segments
            for segment in segments if before else ():
                yield dataclasses.replace(segment, doc_id=segment.doc_id + before)

    def at(self, place: int) -> tuple[int, int, TrainStreams | StretchedStreams]:
        """The number of the plan of a place in every row, from 0, where it begins, and the plan."""
        index = bisect.bisect_right(self._firsts, place) - 1
        return index, self._firsts[index], self._streams[index]

    def _count_documents_before(self, index: int, row: int) -> int:
        """Documents of a row in the plans before, the one that was cut included."""
        total = 0
        for (first, stop), streams in zip(itertools.pairwise(self._firsts[: index + 1]), self._streams, strict=False):
            (last,) = streams.segments(row, stop - first - 1, stop - first)
            total += last.doc_id + 1
        return total


def streams_of(schedule: DataSchedule, split: Split, seed: int) -> StagedStreams:
    """The streams that a run reads now. split: of the data that it reads now."""
    parts, stages = split.parts, split.stages
    first = max(index for index, phase in enumerate(schedule.phases) if phase.data or not index)
    phases = schedule.phases[first:]
    n_drawn = sum(bool(phase.data) for phase in schedule.phases)  # times that the data was another

    def begun_in(phase: Phase, parts: Sequence[Part], n_changes: int) -> TrainStreams | StretchedStreams:
        epoch = EPOCHS_APART * (n_drawn * MOST_CHANGES + n_changes % MOST_CHANGES)
        return begun(split, phase.order, seed, phase.batch_size, epoch, parts)

    held = [stage for stage in stages if stage.first_step <= phases[0].first_step]
    streams = begun_in(phases[0], held[-1].parts if held else parts, len(held))
    n_begun = len(held)
    for phase, following in itertools.zip_longest(phases, phases[1:]):
        # Counted in updates of the phase: what is skipped then holds for the data that it was skipped of. So a phase
        # may have come to a change whose step is in the next one.
        changes = list(enumerate(stages, start=1))[n_begun:]
        plan = StagedStreams(
            [(0, streams)]
            + [
                ((stage.first_step - phase.first_step) * phase.update_len, begun_in(phase, stage.parts, n))
                for n, stage in changes
            ]
        )
        if following is None:
            return plan
        consumed = phase.update(following.first_step) * phase.update_len
        n_passed, begin, streams = plan.at(consumed)
        n_begun += n_passed
        streams = streams.recut(consumed - begin, following.batch_size)
    raise AssertionError("a schedule has a phase")


def begun(
    split: Split, version: int, seed: int, batch_size: int, first_epoch: int = 0, parts: Sequence[Part] = ()
) -> TrainStreams | StretchedStreams:
    """Streams of a split that have read nothing. version: of the order of documents, see schedule.py. first_epoch:
    another one draws another order. parts: of a mixture."""
    if parts and version >= STRETCHED and split.documents.n_documents > MOST_LISTED:
        return StretchedStreams(split.documents, parts, seed, batch_size, first_epoch)
    if parts or version == LISTED:
        order: Order = ListedOrder(split.starts, seed, parts)
    else:
        order = GroupedOrder(split.documents, seed)
    return TrainStreams(order, batch_size, first_epoch)
