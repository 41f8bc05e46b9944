"""The order in which training reads documents: for each epoch a line of tokens, as a pure function of (corpus, seed,
epoch).

There are three versions, and a run keeps the one that it began with (see schedule.py).

Version 1, `ListedOrder`: a permutation of all documents, drawn from (seed, epoch). It is in memory, for all documents.

Version 2, `GroupedOrder`: the groups of documents (groups.py) in an order drawn from (seed, epoch), and the documents
of a group in an order drawn from (seed, epoch, group). What is in memory is the groups' order, and of the groups that
rows are reading the documents'. A corpus of one group has the order of version 1.

Version 3 is version 2 but for mixtures of stores. Those of more than a million documents read stretches of one store
after the other (stretches.py); smaller ones, and all in versions 1 and 2, have a permutation of all documents:

An epoch of a mixture is as long as it takes to read all documents of that store once of which least is read, or ends
after MIXED_DOCUMENTS; of every other store, documents go into it in proportion to the weights, some more than once.
Each store's documents follow each other in permutations drawn from (seed, store, time), without end; an epoch takes
those that come next, and shuffles them with the others'.
"""

import bisect
import concurrent.futures
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tvq_pod.data.groups import DocumentStarts
from tvq_pod.data.store import Part

MIXED_DOCUMENTS = 4_000_000  # of an epoch of a mixture, at most; four times its documents, where they are more
GROUPS_KEPT = 1024  # in memory, 256 KiB each
THREADS = 32  # that read groups


class Piece(NamedTuple):
    """A run of tokens of one document. start: of the first, in the split's tokens. begins: whether the document, or the
    piece of it that the line has, begins here. number: of that piece in the line."""

    start: int
    length: int
    begins: bool
    number: int


class Line(Protocol):
    """Documents, or pieces of them, laid end to end."""

    n_tokens: int

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """The pieces of tokens [begin, end) of the line, in order, cut to that."""
        ...

    def numbers(self, at: np.ndarray) -> np.ndarray:
        """The number, in the line, of the piece that holds each of some tokens: int64 [n] for int64 [n]."""
        ...


class EpochLine(Line, Protocol):
    """The line of an epoch."""

    def numbers_between(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of what `numbers` returns, for which nothing is read: at least the first, less than the second."""
        ...


class Order(Protocol):
    """The line of each epoch. n_tokens: of an epoch, at least."""

    n_tokens: int

    def epoch(self, epoch: int) -> Line:
        """The line of an epoch, from 0."""
        ...


class _Listed:
    """The line of documents whose starts and lengths are in memory."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray):
        self._starts = starts
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])  # where each begins in the line
        self.n_tokens = int(self._bounds[-1])

    def numbers(self, at: np.ndarray) -> np.ndarray:
        """See Line."""
        return np.searchsorted(self._bounds, at, side="right") - 1

    def numbers_between(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See EpochLine."""
        numbers = self.numbers(at)
        return numbers, numbers + 1

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """See Line."""
        number = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        while begin < end:
            first, stop = int(self._bounds[number]), min(int(self._bounds[number + 1]), end)
            yield Piece(int(self._starts[number]) + begin - first, stop - begin, begin == first, number)
            begin, number = stop, number + 1


class PartsOf:
    """Parts of another line, laid end to end. A document that a part begins in is a piece of its own."""

    def __init__(self, line: Line, parts: Sequence[tuple[int, int]]):
        """parts: of the line, (begin, end)."""
        self._line, self._parts = line, [(begin, end) for begin, end in parts if begin < end]
        self._bounds = [0, *itertools.accumulate(end - begin for begin, end in self._parts)]
        self.n_tokens = self._bounds[-1]

    @functools.cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        """For each part the number of its first piece: in the line, and here."""
        begins, ends = np.array(self._parts, np.int64).T
        first, last = self._line.numbers(begins), self._line.numbers(ends - 1)
        return first, np.cumsum(last - first + 1) - (last - first + 1)

    def numbers(self, at: np.ndarray) -> np.ndarray:
        """See Line."""
        part = np.searchsorted(self._bounds, at, side="right") - 1
        first, before = self._known
        begins = np.array(self._parts, np.int64)[part, 0]
        return before[part] + self._line.numbers(begins + at - np.asarray(self._bounds)[part]) - first[part]

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """See Line."""
        part = bisect.bisect_right(self._bounds, begin) - 1
        while begin < end:
            first, before = self._known
            low, stop = self._bounds[part], min(self._bounds[part + 1], end)
            shift, counted = self._parts[part][0] - low, int(before[part] - first[part])
            for piece in self._line.pieces(begin + shift, stop + shift):
                yield piece._replace(begins=piece.begins or begin == low, number=piece.number + counted)
                begin += piece.length
            part += 1


class ListedOrder:
    """Version 1."""

    def __init__(self, starts: np.ndarray, seed: int, parts: Sequence[Part] = ()):
        """starts: [n_documents + 1], where documents begin. parts: of a mixture."""
        self._starts, self._seed, self._parts = starts, seed, parts
        self.n_tokens = int(starts[-1])

    def epoch(self, epoch: int) -> Line:
        """See Order."""
        if self._parts:
            order = mixed_order(self._starts, self._parts, self._seed, epoch)
        else:
            order = draw(self._seed, epoch).permutation(len(self._starts) - 1)
        return _Listed(self._starts[order], np.diff(self._starts)[order])


class GroupedOrder:
    """Version 2."""

    def __init__(self, documents: DocumentStarts, seed: int, groups_kept: int = GROUPS_KEPT):
        """groups_kept: how many groups' orders are kept in memory."""
        self._documents, self._seed = documents, seed
        self._group = functools.lru_cache(maxsize=groups_kept)(self._read_group)
        self.n_tokens = documents.n_tokens

    def epoch(self, epoch: int) -> EpochLine:
        """See Order."""
        if self._documents.n_groups == 1:
            return self._group(epoch, 0)
        order = draw(self._seed, epoch).permutation(self._documents.n_groups)
        return _Grouped(self._documents, order, functools.partial(self._group, epoch))

    def _read_group(self, epoch: int, group: int) -> _Listed:
        """The line of a group's documents."""
        starts = self._documents.of_group(group)
        key = (epoch,) if self._documents.n_groups == 1 else (group, epoch)
        order = draw(self._seed, *key).permutation(len(starts) - 1)
        return _Listed(starts[order], np.diff(starts)[order])


class _Grouped:
    """The line of groups whose documents are read when they are asked for."""

    def __init__(self, documents: DocumentStarts, order: np.ndarray, line_of):
        """order: of the groups. line_of: returns the line of one."""
        self._order, self._line_of = order, line_of
        self._bounds = np.concatenate([[0], np.cumsum(np.diff(documents.tokens)[order])])
        self._numbers = np.concatenate([[0], np.cumsum(np.diff(documents.documents)[order])])
        self.n_tokens = int(self._bounds[-1])

    def numbers(self, at: np.ndarray) -> np.ndarray:
        """See Line."""
        places = np.searchsorted(self._bounds, at, side="right") - 1

        def number(index: int) -> int:
            place = int(places[index])
            line = self._line_of(int(self._order[place]))
            return int(self._numbers[place]) + int(line.numbers(at[index] - self._bounds[place]))

        with concurrent.futures.ThreadPoolExecutor(min(THREADS, len(at))) as threads:
            return np.array(list(threads.map(number, range(len(at)))), np.int64)

    def numbers_between(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See EpochLine: those of the group."""
        places = np.searchsorted(self._bounds, at, side="right") - 1
        return self._numbers[places], self._numbers[places + 1]

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """See Line."""
        place = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        while begin < end:
            low, stop = int(self._bounds[place]), min(int(self._bounds[place + 1]), end)
            before = int(self._numbers[place])
            for start, length, begins, number in self._line_of(int(self._order[place])).pieces(begin - low, stop - low):
                yield Piece(start, length, begins, before + number)
            begin, place = stop, place + 1


def draw(seed: int, *key: int) -> np.random.Generator:
    """Random numbers for an epoch, or for (store or group, time)."""
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
            order = part.first_document + draw(seed, index, time).permutation(part.n_documents)
            lengths = starts[order + 1] - starts[order]
            at = time * n + np.cumsum(lengths) - lengths
            chosen.append(order[(at >= begin) & (at < end)])
    return draw(seed, epoch).permutation(np.concatenate(chosen))
