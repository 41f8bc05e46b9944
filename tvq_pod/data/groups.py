"""The starts of a split's documents, in groups of consecutive documents.

A training order needs one number per group, not one per document: the starts of a group's documents are read when a row
reaches the group.
"""

import dataclasses
import functools
from typing import Protocol

import numpy as np
import tensorstore

GROUP = 2**14  # documents


class Ranges(Protocol):
    """An array whose ranges can be read."""

    def __getitem__(self, places: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentStarts:
    """array: int64 [n_documents + 1], where each document begins in the split's tokens, and the end; on disk, or in
    memory; it may have more documents before and after. documents: int64 [G + 1], the place in it of the first document
    of each of G groups, and of the end. tokens: int64 [G + 1], where each group begins, and the end."""

    array: Ranges | tensorstore.TensorStore
    documents: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(starts: np.ndarray, size: int = GROUP) -> "DocumentStarts":
        """Builds them from starts [n_documents + 1] in memory, in groups of `size` documents."""
        documents = group_bounds(len(starts) - 1, size)
        return DocumentStarts(starts, documents, np.asarray(starts, np.int64)[documents])

    @property
    def n_groups(self) -> int:
        """The number of groups."""
        return len(self.documents) - 1

    @property
    def n_documents(self) -> int:
        """How many documents there are."""
        return int(self.documents[-1] - self.documents[0])

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, their end-of-documents included."""
        return int(self.tokens[-1] - self.tokens[0])

    def between(self, first_document: int, n_documents: int) -> "DocumentStarts":
        """Some of the documents, in the same array. Both ends must be those of groups."""
        first, last = np.searchsorted(self.documents, [first_document, first_document + n_documents])
        return DocumentStarts(self.array, self.documents[first : last + 1], self.tokens[first : last + 1])

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """All starts, in memory: int64 [n_documents + 1]."""
        return self._read(int(self.documents[0]), int(self.documents[-1]) + 1)

    def of_group(self, group: int) -> np.ndarray:
        """Returns the starts of a group's n documents, and their end: int64 [n + 1]."""
        return self._read(int(self.documents[group]), int(self.documents[group + 1]) + 1)

    def _read(self, begin: int, end: int) -> np.ndarray:
        return in_memory(self.array[begin:end])


def in_memory(array: np.ndarray | tensorstore.TensorStore) -> np.ndarray:
    """Returns the elements of an array that may be on disk."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.read().result())


def group_bounds(n_documents: int, size: int) -> np.ndarray:
    """Returns the first document of each group of `size` documents, and n_documents: int64 [G + 1]. The last group may
    have fewer."""
    return np.append(np.arange(0, n_documents, size, dtype=np.int64), n_documents)
