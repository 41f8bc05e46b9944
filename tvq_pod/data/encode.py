"""Encoding documents as token ids on all cores: other processes encode pieces of text, which come back in order."""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

import numpy as np

from tvq_pod.data.vocab import Vocab, pieces
from tvq_pod.data.workers import SPAWN, begin_worker, killed, main_left_alone, signals_kept

BATCH_BYTES = 2**19  # of text given to a process at a time
ALONE_BYTES = 2**22  # of text encoded before other processes are started, which takes seconds
AHEAD = 3  # batches queued for each process, so that none is idle


D = TypeVar("D")  # the caller's handle of a document


@dataclasses.dataclass(frozen=True)
class Tokens(Generic[D]):
    """The tokens of one piece of a document.

    document: the caller's handle of it. ids: uint16 or uint32 [n]. ends: whether this is the document's last piece.
    """

    document: D
    ids: np.ndarray
    ends: bool


def encoded(documents: Iterable[tuple[D, bytes | memoryview]], vocab: Vocab, n_processes: int) -> Iterator[Tokens[D]]:
    """Yields the tokens of documents, given as (handle, text), in their order; long ones come in several pieces.

    n_processes: 0: one a core. A byte vocabulary uses no other processes. Raises UserError if one was killed.
    """
    cut = (
        (document, piece, ends) for document, text in documents for piece, ends in _with_end(pieces(text, vocab))
    )  # fmt: skip
    dtype = np.uint16 if vocab.n_vocab <= 2**16 else np.uint32
    if vocab.takes_any_bytes:
        yield from (Tokens(document, vocab.encode(piece), ends) for document, piece, ends in cut)
        return
    n_alone, n_processes = 0, n_processes or len(os.sched_getaffinity(0))
    for document, piece, ends in cut:
        yield Tokens(document, vocab.encode(piece).astype(dtype), ends)
        n_alone += len(piece)
        if n_alone >= ALONE_BYTES and n_processes > 1:
            break
    else:
        return
    waiting: collections.deque = collections.deque()
    with signals_kept():
        pool = concurrent.futures.ProcessPoolExecutor(n_processes, SPAWN, _begin, (vocab, dtype))
    with pool:
        try:
            for batch in _batches(cut):
                with main_left_alone(), signals_kept():
                    waiting.append((batch, pool.submit(_encode, [piece for _, piece, _ in batch])))
                if len(waiting) > AHEAD * n_processes:
                    yield from _result(*waiting.popleft())
            while waiting:
                yield from _result(*waiting.popleft())
        except BrokenProcessPool:
            raise killed() from None
        finally:
            pool.shutdown(cancel_futures=True)


def _with_end(parts: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    part = next(parts)
    for following in parts:
        yield part, False
        part = following
    yield part, True


def _batches(cut: Iterator[tuple[D, bytes, bool]]) -> Iterator[list[tuple[D, bytes, bool]]]:
    batch, n_bytes = [], 0
    for item in cut:
        batch.append(item)
        n_bytes += len(item[1])
        if n_bytes >= BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _result(batch: list[tuple[D, bytes, bool]], future: concurrent.futures.Future) -> Iterator[Tokens[D]]:
    for (document, _, ends), ids in zip(batch, future.result(), strict=True):
        yield Tokens(document, ids, ends)


# ------------------------------------------------- in the worker processes
_vocab: Vocab | None = None
_dtype: type | None = None


def _begin(vocab: Vocab, dtype: type) -> None:
    global _vocab, _dtype
    _vocab, _dtype = vocab, dtype
    begin_worker()


def _encode(texts: list[bytes]) -> list[np.ndarray]:
    assert _vocab is not None
    return [_vocab.encode(text).astype(_dtype) for text in texts]
