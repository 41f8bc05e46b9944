"""Building a token store: documents are checked, split, encoded and written, from where a killed process stopped."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
import tqdm
from etils import epath

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.document import Document, Documents, Names
from tvq_pod.data.encode import encoded
from tvq_pod.data.store import TokenStore, made_with, split_of
from tvq_pod.data.text import BLOCK_BYTES, usable
from tvq_pod.data.vocab import Vocab, decoded
from tvq_pod.data.writer import StoreWriter, adopted
from tvq_pod.host.terminal import say
from tvq_pod.parallel.deadlines import still_working
from tvq_pod.parallel.processes import is_process_zero

PROBES, PROBE_BYTES = 3, 2**14  # documents, and how much of each, that must come back from their tokens


def make_store(path: epath.PathLike, corpus, vocab: Vocab, data: DataSettings) -> TokenStore:
    """Writes a store of the documents that corpus() gives; goes on where another process was broken off.

    Raises UserError if there is something else at `path`, or no document is left to train on.
    """
    settings = made_with(data)
    counts_words = data.format == "pg19"
    if store := adopted(path, vocab, settings):
        return store
    with StoreWriter(path, vocab, settings) as writer:
        left = _Left(corpus(), vocab, data)
        if not left.pass_over(writer.n_taken, writer.crc_taken):
            left.close()
            say(f"config.data.source={data.source}: is not what it was when {path} was begun: begins anew")
            writer.begin_anew()
            left = _Left(corpus(), vocab, data)
        for tokens in encoded(left, vocab, data.prepare_processes):
            taken = tokens.document
            split = writer.splits[taken.split]
            split.append(tokens.ids)
            if tokens.ends:
                n_words = len(bytes(taken.text).split()) if counts_words and taken.split != "train" else 0
                split.end(len(taken.text), n_words, taken.name)
                writer.may_commit(taken.number, taken.crc)
        left.report()
        return writer.finish(counts_words=counts_words, own_splits=left.own_splits)


class _Taken(NamedTuple):
    """A document that goes into the store. number, crc: of all the corpus' documents up to it, how many, and a CRC-32C
    of their names and texts."""

    name: str
    text: bytes | memoryview
    split: str
    number: int
    crc: int


class _Left:
    """The documents that are left to take, each with its split; at the end it says what it did about those that are
    empty or not UTF-8."""

    def __init__(self, corpus: Documents, vocab: Vocab, data: DataSettings):
        self._corpus, self._vocab, self._data = iter(corpus), vocab, data
        self._number = self._crc = 0
        self._empty, self._odd = Names(), Names()
        self._left_out: dict[str, Names] = {}  # by the reason
        self.own_splits = True  # whether the corpus itself says of each document in which split it is
        self._probes = 0 if vocab.takes_any_bytes else PROBES
        self._bar = tqdm.tqdm(
            unit="B", unit_scale=True, file=sys.stderr, disable=not is_process_zero(), delay=1,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # fmt: skip

    def pass_over(self, n_taken: int, crc_taken: int) -> bool:
        """Passes over documents that were taken before. Returns whether they are the same."""
        while self._number < n_taken:
            document = next(self._corpus, None)
            if document is None:
                return False
            self._count(document)
        if n_taken and self._crc == crc_taken:
            say(f"  goes on after {n_taken:,} documents")
        return self._crc == crc_taken

    def _count(self, document: Document) -> None:
        still_working()
        self._number += 1
        if document.split is None:
            self.own_splits = False
        head = f"{document.name}\0{document.split}\0{len(document.text)}\0"
        self._crc = google_crc32c.extend(self._crc, head.encode("utf-8", errors="surrogateescape"))
        for begin in range(0, len(document.text), BLOCK_BYTES):
            self._crc = google_crc32c.extend(self._crc, bytes(document.text[begin : begin + BLOCK_BYTES]))

    def __iter__(self) -> Iterator[tuple[_Taken, bytes | memoryview]]:
        for document in self._corpus:
            self._count(document)
            self._bar.update(len(document.text))
            if document.problem:
                self._left_out.setdefault(document.problem, Names()).add(document.name)
                continue
            if not len(document.text):
                self._empty.add(document.name)
                continue
            text, is_odd = usable(document, self._vocab.takes_any_bytes, self._data)
            if is_odd and document.is_row and text is None:
                self._left_out.setdefault("not UTF-8", Names()).add(document.name)
            elif is_odd:
                self._odd.add(document.name)
            if text is None:
                continue
            if self._probes:
                self._probes -= 1
                self._probe(document.name, bytes(text[:PROBE_BYTES]))
            split = document.split or split_of(text, self._data.validation_share, self._data.test_share)
            yield _Taken(document.name, text, split, self._number, self._crc), text

    def _probe(self, name: str, begins: bytes) -> None:
        """Warns of a vocabulary that changes text: bits per byte are of the text as it was."""
        text = begins.decode("utf-8", errors="ignore")
        found = decoded(self._vocab.encode(text.encode()), self._vocab)
        if found != text:
            at = next((place for place, pair in enumerate(zip(found, text, strict=False)) if len(set(pair)) > 1), 0)
            say(
                f"  WARNING: this vocabulary changes text: {text[at : at + 20]!r} of {name} comes back as "
                f"{found[at : at + 20]!r}"
            )
            self._probes = 0

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def report(self) -> None:
        """Says what was odd."""
        self.close()
        for why, names in self._left_out.items():
            say(f"  {names.count:,} left out, {why}: {names}")
        if self._empty.count:
            say(f"  {self._empty.count} empty documents left out: {self._empty}")
        if self._odd.count:
            done = {"replace": "their odd bytes became U+FFFD", "skip": "they were left out"}
            done = done.get(self._data.invalid_utf8, "")
            done = "a byte model takes their bytes as they are" if self._vocab.takes_any_bytes else done
            say(f"  {self._odd.count} documents are not UTF-8, {done}: {self._odd}")
