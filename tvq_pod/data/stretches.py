"""Streams of a large mixture: each row reads one store for a stretch of tokens, and then perhaps another one.

A stretch of a row is STRETCH tokens. All rows begin their stretches at the same place. In stretch j, with B rows and
stores that own shares of the circle [0, 1) as large as their weights, row r reads the store at

    u = (i + o) / B,    i = (r + floor(B frac(j sqrt 2))) mod B,    o = frac(j / golden ratio)

So the rows lie on the circle at equal distances: of B rows, each store has its share, rounded up or down, at every
step. What is rounded evens out over stretches, since o is a sequence of low discrepancy, and so do the rows' turns.

A store's documents follow each other without end, epoch after epoch, each in the order of groups (see order.py). The
stretches that read a store take its tokens in turn, those of one j by their rows. So in an epoch of a store every token
is read once. A document that the border of two stretches cuts is two.

Everything follows from (j, row) by arithmetic, and no document is looked at to find out which tokens are read.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tvq_pod.data.groups import DocumentStarts
from tvq_pod.data.order import GROUPS_KEPT, EpochLine, GroupedOrder, Piece
from tvq_pod.data.store import Part
from tvq_pod.data.streams import Segment

STRETCH = 2**20  # tokens
BLOCK = 64  # stretches of a row that are found at once
EPOCHS_BYTES = 2**25  # of the orders of epochs that are kept in memory, of all stores
UNIT = 2**32  # places on the circle between two rows
GOLDEN, ROOT_2 = 2654435769, 1779033703  # of UNIT, the fractions of the golden ratio and of the root of 2


class EndlessStore:
    """The documents of a store, epoch after epoch without end. n_tokens, n_documents: of an epoch."""

    def __init__(self, documents: DocumentStarts, seed: int, first_epoch: int, groups_kept: int, epochs_bytes: int):
        """groups_kept: how many groups' orders are kept in memory. epochs_bytes: how much memory the orders of epochs
        may take; every row looks at all epochs so far."""
        self._first_epoch, self._has_one_group = first_epoch, documents.n_groups == 1
        self.n_tokens, self.n_documents = documents.n_tokens, documents.n_documents
        epochs_kept = max(8, epochs_bytes // (1024 + 24 * documents.n_groups))
        self._epoch = functools.lru_cache(maxsize=epochs_kept)(GroupedOrder(documents, seed, groups_kept).epoch)

    def _line(self, epoch: int) -> EpochLine:
        return self._epoch(self._first_epoch + epoch)

    def numbers_between(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the numbers of the documents at some tokens, int64 [n] each: at least the first, less than the
        second. Documents are numbered through all epochs. Nothing is read for it."""
        epochs, offsets = np.divmod(at, self.n_tokens)
        low, high = np.zeros_like(at), np.full_like(at, self.n_documents)
        for epoch in () if self._has_one_group else np.unique(epochs).tolist():
            here = epochs == epoch
            low[here], high[here] = self._line(epoch).numbers_between(offsets[here])
        return low + epochs * self.n_documents, high + epochs * self.n_documents

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """The pieces of tokens [begin, end)."""
        while begin < end:
            epoch, offset = divmod(begin, self.n_tokens)
            n = min(end - begin, self.n_tokens - offset)
            for piece in self._line(epoch).pieces(offset, offset + n):
                yield piece._replace(number=piece.number + epoch * self.n_documents)
            begin += n


class _Stretch(NamedTuple):
    """A stretch of a row. store: which one it reads. begin: its first token there. first_id: a document id above those
    of the stretches before. first_number: of the store's documents, none of this stretch is below it."""

    store: int
    begin: int
    first_id: int
    first_number: int


class StretchedStreams:
    """The plan of training: endless."""

    def __init__(
        self,
        documents: DocumentStarts,
        parts: Sequence[Part],
        seed: int,
        batch_size: int,
        first_epoch: int = 0,
        first_stretches: Sequence[int] | None = None,
    ):
        """documents: of all stores. parts: which of them are whose, and weights. first_epoch: another one draws
        another order. first_stretches: how many stretches of each store were read before."""
        self._given = documents, parts, seed
        self._batch_size, self._first_epoch = batch_size, first_epoch
        weights = np.array([part.weight for part in parts])
        bounds = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
        bounds = np.where(bounds == bounds[-1], 1.0, bounds)
        self._bounds = np.round(bounds * batch_size * UNIT).astype(np.int64)  # of the stores, on the circle
        self._first_stretches = np.array(first_stretches or [0] * len(parts), np.int64)
        self._stores = [
            EndlessStore(
                documents.between(part.first_document, part.n_documents),
                seed + ((index + 1) << 32),
                first_epoch << 24,
                max(GROUPS_KEPT // 32, round(GROUPS_KEPT * float(weights[index] / weights.sum()))),
                EPOCHS_BYTES // len(parts),
            )
            for index, part in enumerate(parts)
        ]
        self._layout = functools.lru_cache(maxsize=2)(self._make_layout)  # rows are at the same block, or at two
        self._found_block = functools.lru_cache(maxsize=2 * batch_size)(self._find_block)
        self._lock = threading.Lock()  # many threads read rows, and each block is to be found once

    def segments(self, row: int, begin: int, end: int) -> Iterator[Segment]:
        """See Plan. Document ids go up, and leave numbers out."""
        while begin < end:
            index, offset = divmod(begin, STRETCH)
            n = min(end - begin, STRETCH - offset)
            stretch = self._block(row, index // BLOCK)[index % BLOCK]
            at = stretch.begin + offset
            for piece in self._stores[stretch.store].pieces(at, at + n):
                doc_id = stretch.first_id + piece.number - stretch.first_number
                yield Segment(piece.start, piece.length, doc_id, piece.begins or at == stretch.begin)
                at += piece.length
            begin += n

    def recut(self, consumed: int, batch_size: int) -> "StretchedStreams":
        """Other streams, that read each store from where no stretch of these has begun after so many tokens of each
        row. What is left of the stretches that have begun is not read in this epoch of their stores."""
        _, _, firsts = self._layout(-(-consumed // STRETCH))
        return StretchedStreams(*self._given, batch_size, self._first_epoch, firsts[-1].tolist())

    def _block(self, row: int, block: int) -> list[_Stretch]:
        with self._lock:
            return self._found_block(row, block)

    def _make_layout(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of n stretches: how far their rows are turned on the circle, int64 [n]; the place among the rows, in the
        order of the circle, where each store begins, [n, stores + 1]; and how many stretches of each store were
        read before, [n + 1, stores]."""
        index = np.arange(n, dtype=np.int64)
        turned = (index * ROOT_2 % UNIT) * self._batch_size // UNIT
        offsets = index * GOLDEN % UNIT
        places = -((offsets[:, None] - self._bounds) // UNIT)  # of the first row at a bound or above it
        read = np.cumsum(np.concatenate([self._first_stretches[None], np.diff(places)]), axis=0)
        return turned, places, read

    def _find_block(self, row: int, block: int) -> list[_Stretch]:
        """Stretches [block * BLOCK, (block + 1) * BLOCK) of a row."""
        turned, places, read = self._layout((block + 1) * BLOCK)
        place = (row + turned) % self._batch_size
        stores = (place[:, None] >= places[:, 1:]).sum(axis=1)
        each = np.arange(len(place)), stores
        begins = (read[each] + place - places[each]) * STRETCH
        low, high = np.zeros_like(begins), np.zeros_like(begins)
        for number, store in enumerate(self._stores):
            here = stores == number
            low[here], _ = store.numbers_between(begins[here])
            _, high[here] = store.numbers_between(begins[here] + STRETCH - 1)
        first_ids = np.cumsum(high - low) - (high - low)
        found = zip(stores, begins, first_ids, low, strict=True)
        return [_Stretch(*map(int, values)) for values in list(found)[block * BLOCK :]]
