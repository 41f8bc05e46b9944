"""Streams: what each row of each batch reads, as a pure function of (corpus, seed, step, row).

Training. The documents of an epoch, in an order drawn from (seed, epoch), are laid end to end; row r of B owns the part
[r * N // B, (r + 1) * N // B) of these N tokens. A row's stream is its part of epoch 0, then of epoch 1, and so on,
with nothing in between and nothing left over: in an epoch every token is read once. Step n reads tokens
[n * T, (n + 1) * T) of every stream. A document cut by the border of two rows is two pieces, each a document to its
stream.

A mixture of stores. An epoch is as long as it takes to read all documents of that store once of which least is read,
or ends after MIXED_DOCUMENTS; of every other store, documents go into it in proportion to the weights, some more than
once. Each store's documents follow each other in permutations drawn from (seed, store, time), without end; an epoch
takes those that come next, and shuffles them with the others'.

Evaluation. Whole documents are spread over rows, each row's end to end, so that all rows are about equally long; what a
row lacks to the longest is padding.

Both are plans: they answer which piece of which document is where. `read_row` turns the answer into arrays. No iterator
state, no host count, no random number generator survives a call.
"""

import dataclasses
import functools
import heapq
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import tensorstore

from tvq_pod.data.store import Part
from tvq_pod.data.vocab import END_OF_DOC, PAD
from tvq_pod.errors import UserError

MIXED_DOCUMENTS = 4_000_000  # of an epoch of a mixture, at most; four times its documents, where they are more
PADDING = 0.05  # share of positions that evaluation may spend on it, where it may choose


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens of one document in a row."""

    start: int  # of its first token in the split's tokens
    length: int
    doc_id: int  # in the row's stream
    begins: bool  # whether the document, or the row's piece of it, begins here
    position: int = 0  # of its first token in the document, for evaluation


class Plan(Protocol):
    """Which tokens a row reads."""

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """The segments of tokens [begin, end) of a row's stream, in order; fewer tokens only where the row ends."""
        ...


@dataclasses.dataclass(frozen=True)
class _Round:
    """Pieces of documents, laid end to end and cut into rows: an epoch, or what was left of one."""

    starts: np.ndarray  # of each piece, in the split's tokens
    bounds: np.ndarray  # [n_pieces + 1] where each begins in the round
    borders: np.ndarray  # [B + 1] where each row begins in the round
    first: np.ndarray  # [B] the piece that each row begins with, or in
    n_pieces: np.ndarray  # [B] pieces of each row

    @staticmethod
    def cut(starts: np.ndarray, lengths: np.ndarray, batch_size: int) -> "_Round":
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        borders = np.array([row * int(bounds[-1]) // batch_size for row in range(batch_size + 1)], np.int64)
        first = np.searchsorted(bounds, borders[:-1], side="right") - 1
        last = np.searchsorted(bounds, borders[1:] - 1, side="right") - 1
        return _Round(starts, bounds, borders, first, last - first + 1)

    def between(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the pieces in [begin, end) of the round."""
        first = np.searchsorted(self.bounds, begin, side="right") - 1
        last = np.searchsorted(self.bounds, end, side="left")
        cuts = np.clip(self.bounds[first : last + 1], begin, end)
        return self.starts[first:last] + cuts[:-1] - self.bounds[first:last], np.diff(cuts)


class TrainStreams:
    """The plan of training: endless.

    Raises UserError if there are fewer tokens than rows.
    """

    def __init__(
        self,
        starts: np.ndarray,
        batch_size: int,
        seed: int,
        first_epoch: int = 0,
        rest: tuple[np.ndarray, np.ndarray] | None = None,
        parts: Sequence[Part] = (),
    ):
        """starts: [n_documents + 1], where the documents begin; the last entry is the number of tokens N.

        rest: starts and lengths of pieces that are read before first_epoch begins (see `recut`). parts: of a mixture.
        """
        n_tokens = int(starts[-1])
        if n_tokens < batch_size:
            raise UserError(
                f"config.train.batch_size={batch_size}: the corpus has only {n_tokens} tokens; must be at most that"
            )
        self._starts, self._batch_size, self._seed = starts, batch_size, seed
        self._first_epoch, self._rest, self._parts = first_epoch, rest, tuple(parts)
        self._round = functools.lru_cache(maxsize=4)(self._make_round)
        self._first_ids = [np.zeros(batch_size, np.int64)]  # per round: each row's first document id
        self._lock = threading.Lock()

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """See Plan. Document ids count up by one with every piece, from round to round."""
        while begin < end:
            index, offset = self._place(row, begin)
            round_ = self._round(index)
            low, high = int(round_.borders[row]), int(round_.borders[row + 1])
            at, stop = low + offset, min(low + offset + end - begin, high)
            begin += stop - at
            first_id = int(self._first_doc_ids(index)[row])
            piece = int(np.searchsorted(round_.bounds, at, side="right")) - 1
            while at < stop:
                piece_begin, piece_end = int(round_.bounds[piece]), int(round_.bounds[piece + 1])
                length = min(piece_end, stop) - at
                yield Segment(
                    start=int(round_.starts[piece]) + at - piece_begin,
                    length=length,
                    doc_id=first_id + piece - int(round_.first[row]),
                    begins=at == max(piece_begin, low),
                )
                at += length
                piece += 1

    def recut(self, consumed: int, batch_size: int) -> "TrainStreams":
        """Other streams that read on where these have consumed so many tokens of each row.

        What is left of the epoch, row by row in its order, is laid end to end and cut into the new rows; then the next
        epoch begins. Rows differ by a token an epoch: where some have entered the next epoch and others not, the few
        tokens that the others lack are left out, as is a rest of fewer tokens than rows.
        """
        places = [self._place(row, consumed) for row in range(self._batch_size)]
        latest = max(index for index, _ in places)
        round_ = self._round(latest)
        parts = []
        for row, (index, offset) in enumerate(places):
            begin = int(round_.borders[row]) + (offset if index == latest else 0)
            parts.append(round_.between(begin, int(round_.borders[row + 1])))
        starts, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        next_epoch = self._first_epoch + latest + (self._rest is None)
        return TrainStreams(
            self._starts,
            batch_size,
            self._seed,
            next_epoch,
            (starts, lengths) if lengths.sum() >= batch_size else None,
            self._parts,
        )

    def _place(self, row: int, at: int) -> tuple[int, int]:
        """Round, and offset in the row's part of it, of a place in the row's stream."""
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

    def _make_round(self, index: int) -> _Round:
        if self._rest is not None:
            if index == 0:
                return _Round.cut(*self._rest, self._batch_size)
            index -= 1
        epoch = self._first_epoch + index
        if self._parts:
            order = mixed_order(self._starts, self._parts, self._seed, epoch)
        else:
            order = _draw(self._seed, epoch).permutation(len(self._starts) - 1)
        return _Round.cut(self._starts[order], np.diff(self._starts)[order], self._batch_size)

    def _first_doc_ids(self, index: int) -> np.ndarray:
        with self._lock:
            while len(self._first_ids) <= index:
                self._first_ids.append(self._first_ids[-1] + self._round(len(self._first_ids) - 1).n_pieces)
            return self._first_ids[index]


def _draw(seed: int, *key: int) -> np.random.Generator:
    """Random numbers for an epoch, or for (store, time)."""
    number = key[0] if len(key) == 1 else (key[0] + 1) << 40 | key[1]
    return np.random.Generator(np.random.Philox(key=[seed, number]))


def mixed_order(starts: np.ndarray, parts: Sequence[Part], seed: int, epoch: int) -> np.ndarray:
    """The documents of an epoch of a mixture, in order, some more than once: see the top of this file."""
    n_tokens = [int(starts[part.first_document + part.n_documents] - starts[part.first_document]) for part in parts]
    epoch_len = max(n / part.weight for n, part in zip(n_tokens, parts, strict=True) if part.weight)
    # A store of few tokens and a large weight would be read so often that an epoch could not be held in memory.
    n_most = max(MIXED_DOCUMENTS, 4 * sum(part.n_documents for part in parts))
    per_token = sum(part.weight * part.n_documents / n for n, part in zip(n_tokens, parts, strict=True))
    epoch_len = min(epoch_len, n_most / per_token)
    chosen = []
    for index, (part, n) in enumerate(zip(parts, n_tokens, strict=True)):
        if not part.weight:
            continue
        share = round(part.weight * epoch_len)
        begin, end = epoch * share, (epoch + 1) * share  # of the store's documents, end to end without end
        for time in range(begin // n, (end - 1) // n + 1):
            order = part.first_document + _draw(seed, index, time).permutation(part.n_documents)
            lengths = starts[order + 1] - starts[order]
            at = time * n + np.cumsum(lengths) - lengths
            chosen.append(order[(at >= begin) & (at < end)])
    return _draw(seed, epoch).permutation(np.concatenate(chosen))


def _taken(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Documents in an order drawn once and for all, until they have max_tokens together; 0 takes all."""
    order = _draw(0, 0).permutation(len(lengths))
    return order[: int(np.searchsorted(np.cumsum(lengths[order]), max_tokens)) + 1] if max_tokens else order


def _padding(n_tokens: int, n_rows: int, row_len: float, update_len: int) -> float:
    return 1 - n_tokens / (n_rows * math.ceil(row_len / update_len) * update_len)


class PackedDocuments:
    """The plan of evaluation: each document whole, once, on one row.

    Attributes: documents, the indices that were taken; n_rows; row_len, tokens of the longest row; n_tokens, of all;
    longest, tokens of the longest document.
    """

    def __init__(self, starts: np.ndarray, n_rows: int, max_tokens: int = 0):
        """starts: [n_documents + 1]. max_tokens: take documents, in an order drawn once and for all, until they have so
        many tokens together; 0 takes all."""
        self._starts = starts
        lengths = np.diff(starts)
        self.documents = order = _taken(lengths, max_tokens)
        # The longest first, each to the row that is shortest so far.
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
        """On as many rows as leave at most PADDING of the positions to padding, no more than `most`; on `multiple`, of
        which the number of rows must be one, if there is no such number."""
        lengths = np.diff(starts)
        lengths = lengths[_taken(lengths, max_tokens)]
        longest, n_tokens = int(lengths.max()), int(lengths.sum())
        for n_rows in range(most - most % multiple, multiple, -multiple):
            # Whatever the order, a row is as long as the longest document, and not all are shorter than their mean.
            if _padding(n_tokens, n_rows, max(longest, n_tokens / n_rows), update_len) > PADDING:
                continue
            plan = PackedDocuments(starts, n_rows, max_tokens)
            if plan.padding(update_len) <= PADDING:
                return plan
        return PackedDocuments(starts, multiple, max_tokens)

    def positions(self, begin: int, end: int) -> np.ndarray:
        """Places in their documents of tokens [begin, end) of every row: int32 [n_rows, end - begin]; 0 on padding."""
        places = np.zeros([self.n_rows, end - begin], np.int32)
        for row in range(self.n_rows):
            at = 0
            for segment in self.segments(row, begin, end):
                places[row, at : at + segment.length] = np.arange(segment.position, segment.position + segment.length)
                at += segment.length
        return places

    def padding(self, update_len: int) -> float:
        """The share of positions that is padding, where rows are read in updates."""
        return _padding(self.n_tokens, self.n_rows, self.row_len, update_len)

    def tokens_by_position(self, width: int) -> np.ndarray:
        """Tokens at places [k * width, (k + 1) * width) of their documents, for each k: int64 [n]."""
        lengths = np.diff(self._starts)[self.documents]
        return np.array([np.clip(lengths - begin, 0, width).sum() for begin in range(0, self.longest, width)])

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """See Plan. A document's id is its place in the row."""
        bounds = self._bounds[row]
        place = int(np.searchsorted(bounds, begin, side="right")) - 1
        while place < len(self._rows[row]) and bounds[place] < end:
            at, stop = max(begin, int(bounds[place])), min(end, int(bounds[place + 1]))
            start = int(self._starts[self._rows[row][place]]) + at - int(bounds[place])
            position = at - int(bounds[place])
            yield Segment(start, stop - at, doc_id=place, begins=position == 0, position=position)
            place += 1


def read_row(tokens: tensorstore.TensorStore, plan: Plan, row: int, begin: int, end: int, cuts: int = 0) -> dict:
    """The arrays of tokens [begin, end) of one row's stream, each [end - begin]:

    inputs int32: the token before each target in its document; end-of-document at a document's first position.
    targets int32. doc_ids int32. loss_mask float32: 0 on padding, which has a document id of its own.
    cuts: contexts of the stream that ended before these tokens (see Phase). Each counts as the end of a document in
    doc_ids, and nowhere else. Raises UserError if the store is damaged there.
    """
    length = end - begin
    inputs = np.full(length, PAD, np.int32)
    targets = np.full(length, PAD, np.int32)
    doc_ids = np.zeros(length, np.int32)
    loss_mask = np.zeros(length, np.float32)
    segments = list(plan.segments(row, begin, end))
    # One token more at the front, where the document began earlier: it is the first input.
    reads = [tokens[s.start - (not s.begins) : s.start + s.length].read() for s in segments]
    at = 0
    for segment, read in zip(segments, reads, strict=True):
        try:
            values = read.result()
        except ValueError as error:  # names the file
            raise UserError(f"config.data.store: is damaged ({str(error)[:300]}); prepare it anew elsewhere") from None
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


class RowSource:
    """Rows as a random-access source for grain: item i is row i % len(rows) of step first_step + i // len(rows)."""

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
        """rows: the global rows that this process reads. Steps first_step .. last_step - 1 are served. parts: ranges
        of an update's tokens that are read; None reads all. update_of: which update of the streams a step
        reads; None: step n reads update n. cuts_of: how many contexts have ended before a step; None: none ever."""
        self._tokens, self._plan = tokens, plan
        self._rows, self._update_len = rows, update_len
        self._parts = parts or [range(update_len)]
        self._first_step, self._n_steps = first_step, max(last_step - first_step, 0)
        self._update_of = update_of or (lambda step: step)
        self._cuts_of = cuts_of or (lambda step: 0)

    def __len__(self) -> int:
        return self._n_steps * len(self._rows)

    def __getitem__(self, index: int) -> dict:
        step, row = divmod(int(index), len(self._rows))
        first = self._update_of(self._first_step + step) * self._update_len
        cuts = self._cuts_of(self._first_step + step)
        reads = [
            read_row(self._tokens, self._plan, self._rows[row], first + part.start, first + part.stop, cuts)
            for part in self._parts
        ]
        return (
            reads[0] if len(reads) == 1 else {name: np.concatenate([read[name] for read in reads]) for name in reads[0]}
        )
