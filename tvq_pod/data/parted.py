"""Arrays from the parts of a store, or from several stores, read as one."""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
import tensorstore

from tvq_pod.data.groups import DocumentStarts, in_memory


class PartedArray:
    """One-dimensional arrays, concatenated. A read touches only the arrays that hold the range; TensorStore's own
    concatenation looks at every array for every read."""

    def __init__(self, arrays: Sequence["tensorstore.TensorStore | PartedArray"]):
        self._arrays: list[tensorstore.TensorStore] = []
        for array in arrays:
            self._arrays += array._arrays if isinstance(array, PartedArray) else [array]
        self._bounds = [0, *itertools.accumulate(array.shape[0] for array in self._arrays)]
        self.shape, self.dtype = (self._bounds[-1],), self._arrays[0].dtype

    def __getitem__(self, places: slice) -> tensorstore.TensorStore:
        """Returns elements [begin, end)."""
        begin, end, step = places.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"a slice must have step 1, not {places}")
        first = min(bisect.bisect_right(self._bounds, begin), len(self._arrays)) - 1
        found = []
        bounds = itertools.pairwise(self._bounds[first:])
        for array, (low, high) in zip(self._arrays[first:], bounds, strict=True):
            if found and low >= end:
                break
            found.append(array[max(begin - low, 0) : max(min(end, high) - low, 0)])
        return found[0] if len(found) == 1 else tensorstore.concat(found, axis=0)

    def read(self) -> tensorstore.Future:
        """Reads all elements."""
        return self[:].read()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read().result(), dtype)


Array = tensorstore.TensorStore | PartedArray


class _Starts:
    """The start of each document of all parts in their concatenated tokens, and the end: int64 [n_documents + 1]."""

    def __init__(self, parts: Sequence[DocumentStarts]):
        self._parts = parts
        self._documents = [0, *itertools.accumulate(part.n_documents for part in parts)]
        self._tokens = [0, *itertools.accumulate(part.n_tokens for part in parts)]

    def __getitem__(self, places: slice) -> np.ndarray:
        """Returns elements [begin, end)."""
        begin, end, _ = places.indices(self._documents[-1] + 1)
        found, at = [], begin
        place = bisect.bisect_right(self._documents, begin) - 1
        while at < end:
            if at == self._documents[place] and (at == end - 1 or place == len(self._parts)):
                found.append(np.array([self._tokens[place]], np.int64))  # the start of a part is known
                break
            first, stop = self._documents[place], min(end, self._documents[place + 1])
            found.append(in_memory(self._parts[place].array[at - first : stop - first]) + self._tokens[place])
            at, place = stop, place + 1
        return np.concatenate(found) if found else np.zeros(0, np.int64)


def joined(parts: Sequence[DocumentStarts]) -> DocumentStarts:
    """Returns the concatenated documents of parts, none of which is empty; no group spans two parts."""
    if len(parts) == 1:
        return parts[0]
    documents = [0, *itertools.accumulate(part.n_documents for part in parts)]
    tokens = [0, *itertools.accumulate(part.n_tokens for part in parts)]
    return DocumentStarts(
        _Starts(parts),
        np.concatenate([*(part.documents[:-1] + n for part, n in zip(parts, documents, strict=False)), documents[-1:]]),
        np.concatenate([*(part.tokens[:-1] + n for part, n in zip(parts, tokens, strict=False)), tokens[-1:]]),
    )


def end_to_end(arrays: Sequence[Array]) -> Array:
    """Returns arrays concatenated into one."""
    return arrays[0] if len(arrays) == 1 else PartedArray(arrays)
