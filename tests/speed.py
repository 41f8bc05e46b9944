"""How fast corpora become stores, and stores batches. Not a test: `python -m tests.speed --workdir=DIR` prints tables.

Text is this Python's own standard library, its files in a random order, again and again, each as a document.
"""

import argparse
import functools
import itertools
import os
import pathlib
import random
import resource
import subprocess
import sys
import time

import numpy as np

from tests.common import pg19_like
from tests.data.made_streams import made_streams
from tvq_pod.config.resolve import resolve
from tvq_pod.config.settings import DataSettings, MeshSettings
from tvq_pod.data import store as stores
from tvq_pod.data.build import make_store
from tvq_pod.data.corpora import stdlib
from tvq_pod.data.document import Document
from tvq_pod.data.loader import Feed
from tvq_pod.data.store import TokenStore
from tvq_pod.data.streams import PADDING, PackedDocuments, RowSource
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.data.vocab import ByteVocab, SentencePieceVocab
from tvq_pod.parallel.mesh import make_mesh

MB, CORES = 10**6, len(os.sched_getaffinity(0))


@functools.cache
def _texts() -> list[bytes]:
    return [bytes(document.text) for document in stdlib() if len(document.text) > 100]


def corpus(n_bytes: int, cut: int = 0):
    """Documents of n_bytes together; cut: into as many bytes each."""
    if cut:
        for document in corpus(n_bytes):
            for begin in range(0, len(document.text), cut):
                yield Document(f"{document.name}:{begin}", document.text[begin : begin + cut])
        return
    texts, rng, n_given = _texts(), random.Random(0), 0
    for number in itertools.count():
        text = rng.choice(texts)
        n_given += len(text)
        yield Document(str(number), text)
        if n_given >= n_bytes:
            return


def timed(function) -> float:
    """Seconds."""
    began = time.monotonic()
    function()
    return time.monotonic() - began


def prepare(folder: pathlib.Path, n_bytes: int, vocab, cut: int) -> None:
    """One preparation, in this process; says its speed, and the most memory it had, with its children's."""
    data = DataSettings(source="stdlib", invalid_utf8="replace")
    _texts()  # what it takes to read them is no part of the preparation
    seconds = timed(lambda: make_store(folder / "store", lambda: corpus(n_bytes, cut), vocab, data))
    peak = [resource.getrusage(who).ru_maxrss / 1000 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{n_bytes / MB / seconds:.1f} {seconds:.1f} {peak[0]:.0f} {peak[1]:.0f}", flush=True)


def prepare_alone(folder: pathlib.Path, n_bytes: int, vocab: str, cut: int = 0) -> list[float]:
    """The same in a process of its own: MB/s, seconds, peak MB of it and of the largest of its children."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.speed", f"--workdir={folder}", f"--prepare={n_bytes}", f"--vocab={vocab}",
               f"--cut={cut}"]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def pieces_alone(vocab: SentencePieceVocab, n_bytes: int) -> float:
    """MB/s of the library itself, on one core, document by document."""
    texts = [document.text.decode("utf-8", errors="replace") for document in corpus(n_bytes)]
    n_bytes = sum(len(text.encode()) for text in texts)
    encode = vocab._pieces.encode
    return n_bytes / MB / timed(lambda: [encode(text) for text in texts])


def feed(store: TokenStore, batch_size: int, update_len: int, n_steps: int, first_step: int) -> float:
    """Tokens a second, as host arrays, of steps that follow each other."""
    split = store.split("train")
    plan = made_streams(split, batch_size)
    here = Feed(split, plan, make_mesh(MeshSettings()), batch_size, update_len, threads=CORES, ahead=8)
    batches = here.host_batches(range(batch_size), first_step, first_step + n_steps)
    next(batches)
    seconds = timed(lambda: [None for _ in batches])
    return batch_size * update_len * (n_steps - 1) / seconds


def random_rows(store: TokenStore, update_len: int, n_rows: int, seed: int) -> float:
    """Rows a second, of steps and rows at random."""
    split = store.split("train")
    plan = made_streams(split, 128)
    n_steps = int(split.starts[-1]) // 128 // update_len
    source = RowSource(split.tokens, plan, range(128), update_len, 0, n_steps)
    places = np.random.default_rng(seed).integers(len(source), size=n_rows)
    source[0]  # the order of the epoch is drawn once
    return n_rows / timed(lambda: [source[place] for place in places])


def rows_from_disk(path: pathlib.Path, update_len: int, seed: int) -> float:
    """Rows a second of chunks that are in no cache but the system's; where each shard has its chunks is known."""
    tokens = TokenStore(path).split("train").tokens
    chunk_len, shard_len = (size // 2 for size in (stores.CHUNK_BYTES, stores.SHARD_BYTES))
    for begin in range(0, tokens.shape[0], shard_len):
        tokens[begin : begin + 1].read().result()
    chunks = [n for n in range(tokens.shape[0] // chunk_len) if n * chunk_len % shard_len]
    places = [chunk_len * n for n in random.Random(seed).sample(chunks, 250)]
    return len(places) / timed(lambda: [tokens[place : place + update_len].read().result() for place in places])


def padding() -> None:
    """What evaluation spends on padding."""
    for n_books in (50, 100, 28_602):
        for multiple in (1, 8, 16, 64):
            plans = [
                PackedDocuments.on_most_rows(pg19_like(np.random.default_rng(seed), n_books), 128, multiple, 2048)
                for seed in range(20 if n_books < 1000 else 2)
            ]
            shares, rows = [plan.padding(2048) for plan in plans], [plan.n_rows for plan in plans]
            print(
                f"{n_books} books, rows a multiple of {multiple}: {min(rows)} to {max(rows)} rows, padding "
                f"{np.mean(shares):.1%} in the mean, over {PADDING:.0%} in {sum(s > PADDING for s in shares)} of "
                f"{len(plans)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder for everything; must not exist")
    parser.add_argument("--padding", action="store_true", help="only what evaluation spends on padding")
    parser.add_argument("--megabytes", type=int, default=400, help="of the corpus of bytes")
    parser.add_argument("--gigabytes", type=float, default=10, help="of the large store; 0: without")
    parser.add_argument("--prepare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cut", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", default="bytes", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = pathlib.Path(given.workdir)
    if given.padding:
        padding()
        return
    if given.prepare:
        vocab = ByteVocab() if given.vocab == "bytes" else SentencePieceVocab(given.vocab)
        prepare(folder, given.prepare, vocab, given.cut)
        return
    folder.mkdir(parents=True)
    print(f"{CORES} cores")
    speed, _, peak, _ = prepare_alone(folder / "bytes", given.megabytes * MB, "bytes")
    print(f"bytes: {speed:.0f} MB/s, {peak:.0f} MB of memory")
    for cut in (2000, 100):
        speed, *_ = prepare_alone(folder / f"bytes{cut}", 200 * MB if cut > 1000 else 20 * MB, "bytes", cut)
        print(f"bytes, documents of {cut}: {speed:.1f} MB/s")

    model = folder / "own.model"
    model.write_bytes(train_sentencepiece((document.text for document in corpus(10 * MB)), 8000))
    vocab, n_bytes = SentencePieceVocab(model), 150 * MB
    for turn in range(2):
        alone = pieces_alone(vocab, n_bytes // 5)
        speed, _, peak, child = prepare_alone(folder / f"pieces{turn}", n_bytes, str(model))
        print(
            f"SentencePiece: {speed:.1f} MB/s, {peak:.0f} + {CORES} x {child:.0f} MB of memory; the library alone "
            f"{alone:.1f} MB/s, {speed / alone / CORES:.0%} of that times {CORES} cores"
        )

    import configs.enwik8

    train = resolve(configs.enwik8.get_config()).train
    small = folder / "small"
    prepare_alone(small, 10 * MB, "bytes")
    stores = {"10 MB": TokenStore(small / "store"), f"{given.megabytes} MB": TokenStore(folder / "bytes/store")}
    if given.gigabytes:
        speed, seconds, peak, _ = prepare_alone(folder / "large", int(given.gigabytes * 1000 * MB), "bytes")
        print(f"{given.gigabytes:g} GB of bytes: {seconds:.0f} s, {speed:.0f} MB/s, {peak:.0f} MB of memory")
        stores[f"{given.gigabytes:g} GB"] = TokenStore(folder / "large/store")
    for turn in range(3):
        for name, store in stores.items():
            n_tokens = int(store.split("train").starts[-1])
            first = n_tokens // train.batch_size // train.update_len // 3 + 40 * turn
            tokens = feed(store, train.batch_size, train.update_len, 36, first)
            rows = random_rows(store, train.update_len, 2000, turn)
            cold = rows_from_disk(store.path, train.update_len, turn)
            print(
                f"{name}: {tokens / 1e6:.2f} million tokens/s in order; at random {rows:,.0f} rows/s, {cold:,.0f} "
                "where none is in memory"
            )


if __name__ == "__main__":
    main()
