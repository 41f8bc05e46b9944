"""Checking documents on their way into a store and giving each its split, in batches, since many may be tiny."""

import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.document import Block, Document, LineNames, Names
from tvq_pod.data.store import SPLITS, split_of
from tvq_pod.data.text import BLOCK_BYTES, usable
from tvq_pod.data.vocab import END_OF_DOC, PIECE_BYTES, Vocab, decoded, pieces
from tvq_pod.data.writer import SplitWriter
from tvq_pod.host.terminal import say

BATCH_BYTES = 2**20  # of text; a batch with a longer document has no other after it
BATCH_SECONDS = 1.0  # after which a batch ends, however few documents have come
PROBES, PROBE_BYTES = 3, 2**14  # how many documents, and how much of each, must come back from their tokens
MARGIN = 2**12  # of 2**64: how far a float may be off


class Batch(NamedTuple):
    """Documents that go into the store. names, texts, splits: one for each document. n_bytes: the bytes of all
    documents read for this batch. number, crc: how many documents of the corpus were read up to the batch's end, and
    a CRC-32C of their names and texts."""

    names: Sequence[str] | LineNames
    texts: Sequence[bytes | memoryview]
    splits: list[str]
    n_bytes: int
    number: int
    crc: int


class Report:
    """Counts of documents that are empty, not UTF-8, or have no text."""

    def __init__(self):
        self.empty, self.odd = Names(), Names()
        self.left_out: dict[str, Names] = {}  # by reason

    def leave_out(self, reason: str, name: str) -> None:
        """Counts a document that is left out."""
        self.left_out.setdefault(reason, Names()).add(name)

    def to_json(self) -> dict:
        """Returns the report as lists and dicts."""
        left_out = {why: names.to_json() for why, names in self.left_out.items()}
        return dict(empty=self.empty.to_json(), odd=self.odd.to_json(), left_out=left_out)

    def add(self, other: dict) -> None:
        """Adds the counts of another report, given as its `to_json`."""
        self.empty.extend(Names.from_json(other["empty"]))
        self.odd.extend(Names.from_json(other["odd"]))
        for why, names in other["left_out"].items():
            self.left_out.setdefault(why, Names()).extend(Names.from_json(names))

    def say(self, vocab: Vocab, data: DataSettings) -> None:
        """Prints the report."""
        for why, names in self.left_out.items():
            say(f"  leaves out {names.count:,} ({why}): {names}")
        if self.empty.count:
            say(f"  leaves out {_documents(self.empty.count, 'empty ')}: {self.empty}")
        if self.odd.count:
            done = {"replace": "replaces other bytes by U+FFFD in", "skip": "leaves out"}.get(data.invalid_utf8, "")
            done = "keeps the bytes of" if vocab.takes_any_bytes else done
            n = self.odd.count
            say(f"  {done} {_documents(n)} that {'is' if n == 1 else 'are'} not UTF-8: {self.odd}")


def _documents(n: int, kind: str = "") -> str:
    return f"{n:,} {kind}document{'s' * (n != 1)}"


class Checked:
    """An iterable of a corpus's documents, in batches. Attributes: report; own_splits: whether the corpus itself gives
    every document its split; number, crc: see Batch."""

    def __init__(self, corpus: Iterable[Document | Block], vocab: Vocab, data: DataSettings, counts: bool = True):
        """counts: whether a CRC-32C is computed; then the corpus has no blocks."""
        self._corpus, self._vocab, self._data, self._counts = iter(corpus), vocab, data, counts
        self.report, self.own_splits, self.number, self.crc = Report(), True, 0, 0
        self._surely_train = _train_bound(data)

    def pass_over(self, n: int, crc: int) -> bool:
        """Skips n documents that were taken earlier. Returns whether they are the same."""
        while self.number < n:
            document = next(self._corpus, None)
            if document is None:
                return False
            assert not isinstance(document, Block)  # since this needs a CRC-32C
            self._count(Block.of([document]))
        return self.crc == crc

    def __iter__(self) -> Iterator[Batch]:
        return map(self._checked, _in_blocks(self._corpus))

    def _count(self, block: Block) -> None:
        self.number += len(block.texts)
        self.own_splits = self.own_splits and None not in block.splits
        if not self._counts:
            return
        parts = []
        for name, text, split in zip(block.names, block.texts, block.splits, strict=True):
            parts.append(f"{name}\0{split}\0{len(text)}\0".encode("utf-8", errors="surrogateescape"))
            if len(text) <= BLOCK_BYTES:
                parts.append(text)
                continue
            self.crc = google_crc32c.extend(self.crc, b"".join(parts))
            parts = []
            for begin in range(0, len(text), BLOCK_BYTES):
                self.crc = google_crc32c.extend(self.crc, bytes(text[begin : begin + BLOCK_BYTES]))
        self.crc = google_crc32c.extend(self.crc, b"".join(parts))

    def _checked(self, block: Block) -> Batch:
        self._count(block)
        names, texts, splits = block.names, block.texts, block.splits
        n_bytes = sum(map(len, texts))
        usable = {place: self._usable(block.document(place)) for place in _suspects(block)}
        if any(text is not texts[place] for place, text in usable.items()):
            kept = [usable.get(place, text) for place, text in enumerate(texts)]
            take = [text is not None for text in kept]
            names, splits = list(itertools.compress(names, take)), list(itertools.compress(splits, take))
            texts = [text for text in kept if text is not None]
        return Batch(names, texts, self._splits(texts, splits), n_bytes, self.number, self.crc)

    def _usable(self, document: Document) -> bytes | memoryview | None:
        """Returns the text of a document as it is to be encoded; None leaves it out."""
        if document.problem:
            self.report.leave_out(document.problem, document.name)
            return None
        if not len(document.text):
            self.report.empty.add(document.name)
            return None
        text, is_odd = usable(document, self._vocab.takes_any_bytes, self._data)
        if is_odd and document.is_row and text is None:
            self.report.leave_out("not UTF-8", document.name)
        elif is_odd:
            self.report.odd.add(document.name)
        return text

    def _splits(self, texts: Sequence[bytes | memoryview], own: Sequence[str | None]) -> list[str]:
        """own: the splits that the corpus gives."""
        shares = self._data.validation_share, self._data.test_share
        sha256, bound = hashlib.sha256, self._surely_train
        return [
            given or ("train" if sha256(text).digest() > bound else split_of(text, *shares))
            for given, text in zip(own, texts, strict=True)
        ]


def _in_blocks(corpus: Iterable[Document | Block]) -> Iterator[Block]:
    """Yields the documents of a corpus in blocks."""
    documents, n_bytes, began = [], 0, time.monotonic()
    for document in corpus:
        if isinstance(document, Block):  # then all are
            yield document
            continue
        documents.append(document)
        n_bytes += len(document.text)
        if n_bytes >= BATCH_BYTES or time.monotonic() - began >= BATCH_SECONDS:
            yield Block.of(documents)
            documents, n_bytes, began = [], 0, time.monotonic()
    if documents:
        yield Block.of(documents)


def _train_bound(data: DataSettings) -> bytes:
    """Returns a bound: a text whose SHA-256 is greater is in the training split; `split_of` decides for others."""
    bound = math.ceil((data.validation_share + data.test_share) * 2**64) + MARGIN
    return bound.to_bytes(8) if bound < 2**64 else b"\xff" * 32


def _suspects(block: Block) -> Sequence[int]:
    """Returns the places of documents that may have a problem, no text, or text that is not UTF-8."""
    texts = block.texts
    if len(texts[-1]) > BLOCK_BYTES:  # it may be a file of any size
        return range(len(texts))
    found = []
    if not all(texts) or any(block.problems):
        found = [place for place, text in enumerate(texts) if not text or block.problems[place]]
    whole = b"\n".join(texts)  # no character contains a newline, so they are tested in one piece
    if not _is_utf8(whole):
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
        is_high = np.frombuffer(whole + b"\n", np.uint8) > 127
        found += np.flatnonzero(np.logical_or.reduceat(is_high, np.cumsum(lengths) - lengths)).tolist()
    return sorted(set(found))


def _is_utf8(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def write_batch(batch: Batch, splits: dict[str, SplitWriter], vocab: Vocab, counts_words: bool = False) -> None:
    """Encodes the documents of a batch and adds them to their splits. counts_words: whether the words of held-out
    documents are counted."""
    are_small = max(map(len, batch.texts), default=0) <= PIECE_BYTES
    for split in SPLITS:
        takes_words = counts_words and split != "train"
        if takes_words or not are_small:
            for name, text, own in zip(batch.names, batch.texts, batch.splits, strict=True):
                if own == split:
                    for piece in pieces(text, vocab):
                        splits[split].append(vocab.encode(piece))
                    splits[split].end(len(text), len(bytes(text).split()) if takes_words else 0, name)
            continue
        mine = [place for place, own in enumerate(batch.splits) if own == split]
        if texts := [batch.texts[place] for place in mine]:
            names = (batch.names[place] for place in mine)
            n_bytes = np.fromiter(map(len, texts), np.int64, len(texts))
            splits[split].append_documents(*_encoded(texts, n_bytes, vocab), n_bytes, names)


def _encoded(texts: list[bytes | memoryview], n_bytes: np.ndarray, vocab: Vocab) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of texts, with an end-of-document after each, and how many each has, int64 [n]."""
    if vocab.takes_any_bytes:
        ids, n_tokens = vocab.encode(b"\0".join([*texts, b""])), n_bytes + 1
        ids[np.cumsum(n_tokens) - 1] = END_OF_DOC
        return ids, n_tokens
    end = np.full(1, END_OF_DOC, np.uint32)
    encoded = [vocab.encode(bytes(text)) for text in texts]
    n_tokens = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 1
    return np.concatenate([part for ids in encoded for part in (ids, end)]), n_tokens


def probe(batch: Batch, vocab: Vocab, n_most: int) -> int:
    """Warns of a vocabulary that changes text, since bits per byte count the bytes of the original. n_most: how many of
    the batch's documents are tried. Returns how many of the next batch's may still be tried."""
    for name, whole in list(zip(batch.names, batch.texts, strict=True))[:n_most]:
        text = bytes(whole[:PROBE_BYTES]).decode("utf-8", errors="ignore")
        found = decoded(vocab.encode(text.encode()), vocab)
        if found != text:
            at = next((place for place, pair in enumerate(zip(found, text, strict=False)) if len(set(pair)) > 1), 0)
            say(
                f"  WARNING: this vocabulary changes text: {text[at : at + 20]!r} of {name} comes back as "
                f"{found[at : at + 20]!r}"
            )
            return 0
    return max(n_most - len(batch.texts), 0)
