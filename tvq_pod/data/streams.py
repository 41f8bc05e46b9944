"""Streams: what each row of each batch reads, as a pure function of (corpus, seed, step, row).

Training. The documents of an epoch are concatenated in an order drawn from (seed, epoch) (see order.py); row r of B
owns the part [r * N // B, (r + 1) * N // B) of these N tokens. A row's stream is its part of epoch 0, then of epoch 1,
and so on, with nothing in between and nothing left over: in an epoch every token is read once. Step n reads tokens
[n * T, (n + 1) * T) of every stream. A document cut at the border between two rows is two pieces, each a document to
its stream.

Evaluation. Complete documents are distributed over rows and concatenated there, so that all rows are about equally
long; shorter rows are padded to the length of the longest.

Both are plans: they say which piece of which document is where. `read_row` turns that into arrays. No iterator state,
host count or random number generator survives a call.
"""

import dataclasses
import functools
import heapq
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tvq_pod.data.order import Line, Order, PartsOf, draw
from tvq_pod.data.parted import Array
from tvq_pod.data.vocab import END_OF_DOC, PAD
from tvq_pod.errors import UserError

PADDING = 0.05  # share of positions that evaluation may spend on padding, if it has a choice


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens of one document in a row."""

    start: int  # of its first token in the split's tokens
    length: int
    doc_id: int  # in the row's stream
    begins: bool  # whether the document, or the row's piece of it, begins here
    position: int = 0  # of its first token in the document, for evaluation


class Plan(Protocol):
    """Says which tokens a row reads."""

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """Yields the segments of tokens [begin, end) of a row's stream, in order; fewer only where the row ends."""
        ...


class TrainStreams:
    """The plan of training, which is endless.

    Raises UserError if there are fewer tokens than rows.
    """

    def __init__(self, order: Order, batch_size: int, first_epoch: int = 0, rest: Line | None = None):
        """rest: the tokens to read before first_epoch begins (see `recut`)."""
        if order.n_tokens < batch_size:
            raise UserError(
                f"config.train.batch_size={batch_size}: must be at most {order.n_tokens}, the number of tokens to "
                "train on; give more text, or fewer rows"
            )
        self._order, self._batch_size, self._first_epoch, self._rest = order, batch_size, first_epoch, rest
        self._made_round = functools.lru_cache(maxsize=4)(self._make_round)
        self._counted: list[_Counted] = []
        self._lock = threading.RLock()  # many threads read rows, but each round is made only once

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """See Plan. Document ids increase by one with every piece, across rounds."""
        while begin < end:
            index, offset = self._place(row, begin)
            round_ = self._round(index)
            low, high = int(round_.borders[row]), int(round_.borders[row + 1])
            at, stop = low + offset, min(low + offset + end - begin, high)
            begin += stop - at
            counted = self._count(index)
            first_id = int(counted.first_ids[row] - counted.first_pieces[row])
            for piece in round_.line.pieces(at, stop):
                yield Segment(piece.start, piece.length, first_id + piece.number, piece.begins or at == low)
                at += piece.length

    def recut(self, consumed: int, batch_size: int) -> "TrainStreams":
        """Returns streams of another batch size that continue after `consumed` tokens of each row.

        The rest of the epoch, row by row in order, is concatenated and cut into the new rows; then the next epoch
        begins. Row lengths differ by up to one token per epoch: if some rows have entered the next epoch and others
        have not, the few tokens that the others lack are left out, as is a rest of fewer tokens than rows.
        """
        places = [self._place(row, consumed) for row in range(self._batch_size)]
        latest = max(index for index, _ in places)
        round_ = self._round(latest)
        left = []
        for row, (index, offset) in enumerate(places):
            begin = int(round_.borders[row]) + (offset if index == latest else 0)
            left.append((begin, int(round_.borders[row + 1])))
        rest = PartsOf(round_.line, left)
        next_epoch = self._first_epoch + latest + (self._rest is None)
        return TrainStreams(self._order, batch_size, next_epoch, rest if rest.n_tokens >= batch_size else None)

    def _place(self, row: int, at: int) -> tuple[int, int]:
        """Returns the round of a place in a row's stream, and the offset in the row's part of that round."""
        n_before = 0
        if self._rest is not None:
            length = self._length(0, row)
            if at < length:
                return 0, at
            at, n_before = at - length, 1
        index, offset = divmod(at, self._length(n_before, row))
        return n_before + index, offset

    def _length(self, index: int, row: int) -> int:
        borders = self._round(index).borders
        return int(borders[row + 1] - borders[row])

    def _round(self, index: int) -> "_Round":
        with self._lock:
            return self._made_round(index)

    def _make_round(self, index: int) -> "_Round":
        if self._rest is not None and index == 0:
            line = self._rest
        else:
            line = self._order.epoch(self._first_epoch + index - (self._rest is not None))
        n_tokens = line.n_tokens
        return _Round(line, np.array([row * n_tokens // self._batch_size for row in range(self._batch_size + 1)]))

    def _count(self, index: int) -> "_Counted":
        with self._lock:
            while len(self._counted) <= index:
                round_ = self._round(len(self._counted))
                borders = round_.borders
                first, last = np.split(round_.line.numbers(np.concatenate([borders[:-1], borders[1:] - 1])), 2)
                before = self._counted[-1].next_ids if self._counted else np.zeros(self._batch_size, np.int64)
                self._counted.append(_Counted(first, before, before + last - first + 1))
            return self._counted[index]


class _Round(NamedTuple):
    """An epoch, or the rest of one. borders: int64 [B + 1], where each row begins in the line, and the line's end."""

    line: Line
    borders: np.ndarray


class _Counted(NamedTuple):
    """Numbers for each row of a round: of its first piece in the line, its first document id, and that of the next
    round; int64 [B] each."""

    first_pieces: np.ndarray
    first_ids: np.ndarray
    next_ids: np.ndarray


def _taken(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Returns documents in a fixed random order, until they have max_tokens together; 0 takes all."""
    order = draw(0, 0).permutation(len(lengths))
    return order[: int(np.searchsorted(np.cumsum(lengths[order]), max_tokens)) + 1] if max_tokens else order


def _padding(n_tokens: int, n_rows: int, row_len: float, update_len: int) -> float:
    return 1 - n_tokens / (n_rows * math.ceil(row_len / update_len) * update_len)


class PackedDocuments:
    """The plan of evaluation: each document once, complete, on one row.

    Attributes: documents: the indices of those taken; n_rows; row_len: tokens of the longest row; n_tokens: tokens of
    all rows; longest: tokens of the longest document.
    """

    def __init__(self, starts: np.ndarray, n_rows: int, max_tokens: int = 0):
        """starts: [n_documents + 1]. max_tokens: take documents, in a fixed random order, until they have this many
        tokens together; 0 takes all."""
        self._starts = starts
        lengths = np.diff(starts)
        self.documents = order = _taken(lengths, max_tokens)
        # Longest first, each to the row that is shortest so far.
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        loads = [(0, row) for row in range(n_rows)]
        for document in order[np.argsort(-lengths[order], kind="stable")].tolist():
            load, row = loads[0]
            rows[row].append(document)
            heapq.heapreplace(loads, (load + int(lengths[document]), row))
        self.n_rows, self.row_len = n_rows, max(load for load, _ in loads)
        self.n_tokens = sum(load for load, _ in loads)
        self.longest = int(lengths[order].max())
        self._rows = rows
        self._bounds = [np.concatenate([[0], np.cumsum(lengths[row], dtype=np.int64)]) for row in rows]

    @staticmethod
    def on_most_rows(
        starts: np.ndarray, most: int, multiple: int, update_len: int, max_tokens: int = 0
    ) -> "PackedDocuments":
        """Packs documents on the largest number of rows with at most PADDING of padding: a multiple of `multiple`, and
        at most `most`. If there is no such number, packs them on `multiple` rows."""
        lengths = np.diff(starts)
        lengths = lengths[_taken(lengths, max_tokens)]
        longest, n_tokens = int(lengths.max()), int(lengths.sum())
        for n_rows in range(most - most % multiple, multiple, -multiple):
            # In any order, the longest row is no shorter than the longest document or the rows' mean.
            if _padding(n_tokens, n_rows, max(longest, n_tokens / n_rows), update_len) > PADDING:
                continue
            plan = PackedDocuments(starts, n_rows, max_tokens)
            if plan.padding(update_len) <= PADDING:
                return plan
        return PackedDocuments(starts, multiple, max_tokens)

    def document_of(self, row: int, segment: Segment) -> int:
        """Returns the index of the document that a segment of a row belongs to."""
        return self._rows[row][segment.doc_id]

    def positions(self, begin: int, end: int) -> np.ndarray:
        """Returns the positions in their documents of tokens [begin, end) of every row: int32 [n_rows, end - begin]; 0
        on padding."""
        places = np.zeros([self.n_rows, end - begin], np.int32)
        for row in range(self.n_rows):
            at = 0
            for segment in self.segments(row, begin, end):
                places[row, at : at + segment.length] = np.arange(segment.position, segment.position + segment.length)
                at += segment.length
        return places

    def padding(self, update_len: int) -> float:
        """Returns the share of positions that is padding, if rows are read in updates."""
        return _padding(self.n_tokens, self.n_rows, self.row_len, update_len)

    def tokens_by_position(self, width: int) -> np.ndarray:
        """Returns the number of tokens at positions [k * width, (k + 1) * width) of documents for each k: int64 [n]."""
        lengths = np.diff(self._starts)[self.documents]
        return np.array([np.clip(lengths - begin, 0, width).sum() for begin in range(0, self.longest, width)])

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """See Plan. A document's id is its index in the row."""
        bounds = self._bounds[row]
        place = int(np.searchsorted(bounds, begin, side="right")) - 1
        while place < len(self._rows[row]) and bounds[place] < end:
            at, stop = max(begin, int(bounds[place])), min(end, int(bounds[place + 1]))
            start = int(self._starts[self._rows[row][place]]) + at - int(bounds[place])
            position = at - int(bounds[place])
            yield Segment(start, stop - at, doc_id=place, begins=position == 0, position=position)
            place += 1


def read_row(tokens: Array, plan: Plan, row: int, begin: int, end: int, cuts: int = 0) -> dict:
    """Reads tokens [begin, end) of one row's stream into arrays, each [end - begin]:

    inputs int32: the token before each target in its document; end-of-document at a document's first position.
    targets int32. doc_ids int32. loss_mask float32: 0 on padding, which has a document id of its own.
    cuts: how many contexts of the stream ended before these tokens (see Phase). Each counts as the end of a document in
    doc_ids, and nowhere else. Raises UserError if the store is damaged there.
    """
    return request_row(tokens, plan, row, begin, end, cuts)()


def request_row(
    tokens: Array, plan: Plan, row: int, begin: int, end: int, cuts: int = 0
) -> Callable[[], dict[str, np.ndarray]]:
    """Starts to read tokens of a row. Returns a function that waits for them and returns what `read_row` does."""
    segments = list(plan.segments(row, begin, end))
    # If the document began earlier, one more token is read at the front: it is the first input.
    reads = [tokens[s.start - (not s.begins) : s.start + s.length].read() for s in segments]

    def finish() -> dict[str, np.ndarray]:
        length, at = end - begin, 0
        inputs = np.full(length, PAD, np.int32)
        targets = np.full(length, PAD, np.int32)
        doc_ids = np.zeros(length, np.int32)
        loss_mask = np.zeros(length, np.float32)
        for segment, read in zip(segments, reads, strict=True):
            try:
                values = read.result()
            except ValueError as error:  # names the file
                raise UserError(
                    f"config.data.store: is damaged ({str(error)[:300]}); prepare it again in another folder"
                ) from None
            stop = at + segment.length
            targets[at:stop] = values[-segment.length :]
            inputs[at:stop] = np.concatenate([[END_OF_DOC], values[:-1]]) if segment.begins else values[:-1]
            doc_ids[at:stop] = segment.doc_id + cuts  # numpy refuses what int32 does not hold
            loss_mask[at:stop] = 1.0
            at = stop
        if at < length:
            # All padding of a row has one id, above every document's.
            doc_ids[at:] = np.iinfo(np.int32).max
        return dict(inputs=inputs, targets=targets, doc_ids=doc_ids, loss_mask=loss_mask)

    return finish


class BatchSource:
    """Batches as a random-access source for grain: item i is the batch of step first_step + i, arrays
    [len(rows), tokens] of what `read_row` returns for each row. All rows of a batch are read at the same time, so a
    batch from a bucket takes as long as its slowest read."""

    def __init__(
        self,
        tokens,
        plan: Plan,
        rows: Sequence[int],
        update_len: int,
        first_step: int,
        last_step: int,
        parts: Sequence[range] | None = None,
        update_of: Callable[[int], int] | None = None,
        cuts_of: Callable[[int], int] | None = None,
    ):
        """rows: the global rows that this process reads. Steps first_step .. last_step - 1 are served. parts: the
        ranges of an update's tokens to read; None reads all. update_of: which update of the streams a step reads; None:
        step n reads update n. cuts_of: how many contexts have ended before a step; None: none."""
        self._tokens, self._plan = tokens, plan
        self._rows, self._update_len = rows, update_len
        self._parts = parts or [range(update_len)]
        self._first_step, self._n_steps = first_step, max(last_step - first_step, 0)
        self._update_of = update_of or (lambda step: step)
        self._cuts_of = cuts_of or (lambda step: 0)

    def __len__(self) -> int:
        return self._n_steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step = self._first_step + int(index)
        first, cuts = self._update_of(step) * self._update_len, self._cuts_of(step)
        requested = [
            [
                request_row(self._tokens, self._plan, row, first + part.start, first + part.stop, cuts)
                for row in self._rows
            ]
            for part in self._parts
        ]
        parts = [[finish() for finish in rows] for rows in requested]
        return {
            name: np.concatenate([np.stack([row[name] for row in rows]) for rows in parts], axis=1)
            for name in parts[0][0]
        }
