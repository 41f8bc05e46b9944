"""Building a token store: documents are checked, split, encoded and written, resuming where a killed process stopped.

A store of one part is made here. One of several is made in build_parts.py.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import tqdm
from etils import epath

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.checked import PROBES, Checked, probe, write_batch
from tvq_pod.data.encode import encoded
from tvq_pod.data.place import adopted
from tvq_pod.data.store import TokenStore, made_with
from tvq_pod.data.vocab import Vocab
from tvq_pod.data.writer import StoreWriter
from tvq_pod.host.terminal import say
from tvq_pod.parallel.deadlines import still_working
from tvq_pod.parallel.processes import is_process_zero


def make_store(
    path: epath.PathLike, corpus, vocab: Vocab, data: DataSettings, files: str = "", **more: str
) -> TokenStore:
    """Writes a store of the documents that corpus() gives; resumes where another process was interrupted.

    files: the `signature` of the files that the documents come from, or "" if they come from none. more: further
    entries of store.json. Raises UserError if there is something else at `path`, or no document is left to train on.
    """
    settings = made_with(data)
    counts_words = data.format == "pg19"
    if store := adopted(path, vocab, settings):
        return store
    with StoreWriter(path, vocab, settings) as writer:
        checked = Checked(corpus(), vocab, data)
        if not checked.pass_over(writer.n_taken, writer.crc_taken):
            say(f"config.data.source={data.source}: has changed since {path} was begun; starting over")
            writer.begin_anew()
            checked = Checked(corpus(), vocab, data)
        elif writer.n_taken:
            say(f"  continues after {writer.n_taken:,} documents")
        with progress_bar() as bar:
            if vocab.takes_any_bytes:
                for batch in checked:
                    write_batch(batch, writer.splits, vocab, counts_words)
                    writer.may_commit(batch.number, batch.crc)
                    still_working()
                    bar.update(batch.n_bytes)
            else:
                for tokens in encoded(_one_by_one(checked, vocab, bar), vocab, data.prepare_processes):
                    taken = tokens.document
                    split = writer.splits[taken.split]
                    split.append(tokens.ids)
                    if tokens.ends:
                        n_words = len(bytes(taken.text).split()) if counts_words and taken.split != "train" else 0
                        split.end(len(taken.text), n_words, taken.name)
                        if taken.number:
                            writer.may_commit(taken.number, taken.crc)
        checked.report.say(vocab, data)
        return writer.finish(files, counts_words=counts_words, own_splits=checked.own_splits, **more)


def progress_bar() -> tqdm.tqdm:
    """A progress bar of the bytes of text taken so far."""
    return tqdm.tqdm(
        unit="B", unit_scale=True, file=sys.stderr, disable=not is_process_zero(), delay=1,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip


class _Taken(NamedTuple):
    """A document. number, crc: those of its `Batch` for a batch's last document; 0 for others."""

    name: str
    text: bytes | memoryview
    split: str
    number: int
    crc: int


def _one_by_one(checked: Checked, vocab: Vocab, bar: tqdm.tqdm) -> Iterator[tuple[_Taken, bytes | memoryview]]:
    n_probes = PROBES
    for batch in checked:
        still_working()
        bar.update(batch.n_bytes)
        n_probes = probe(batch, vocab, n_probes)
        last = len(batch.texts) - 1
        for place, document in enumerate(zip(batch.names, batch.texts, batch.splits, strict=True)):
            yield _Taken(*document, *((batch.number, batch.crc) if place == last else (0, 0))), document[1]
