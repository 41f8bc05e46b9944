"""How fast corpora become stores, and stores batches. Not a test: `python -m tests.speed --workdir=DIR` prints tables.

Text is this Python's own standard library, its files in a random order, again and again, each as a document.
"""

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import os
import pathlib
import random
import re
import resource
import subprocess
import sys
import time

import numpy as np
from etils import epath

from tests.common import pg19_like, small_config
from tests.data.made_streams import made_streams
from tvq_pod.config.resolve import resolve
from tvq_pod.config.settings import DataSettings, MeshSettings, Settings
from tvq_pod.data import store as stores
from tvq_pod.data.build import make_store
from tvq_pod.data.corpora import stdlib
from tvq_pod.data.cut import signature
from tvq_pod.data.document import Document
from tvq_pod.data.loader import Feed
from tvq_pod.data.open import open_store
from tvq_pod.data.part import PartTask, write_part
from tvq_pod.data.sources import listing
from tvq_pod.data.store import TokenStore
from tvq_pod.data.streams import PADDING, PackedDocuments, read_row
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.data.vocab import SentencePieceVocab, load_vocab
from tvq_pod.parallel.mesh import make_mesh

MB, CORES = 10**6, len(os.sched_getaffinity(0))


@functools.cache
def _texts() -> list[bytes]:
    return [bytes(document.text) for document in stdlib() if len(document.text) > 100]


def corpus(n_bytes: int):
    """Documents of n_bytes together."""
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


def prepare(folder: pathlib.Path, n_bytes: int, vocab: str) -> None:
    """One preparation, in this process, of a store of one part; see `say_cost`."""
    data = DataSettings(source="stdlib", invalid_utf8="replace")
    _texts()  # what it takes to read them is no part of the preparation
    say_cost(n_bytes, lambda: make_store(folder / "store", lambda: corpus(n_bytes), load_vocab(vocab), data))


def prepare_file(folder: pathlib.Path, path: pathlib.Path, vocab: str) -> None:
    """The same of the documents of a file of lines or JSON lines, as --mode=prepare does it."""
    data = DataSettings(source=str(path), vocab=vocab, store=str(folder / "store"), invalid_utf8="replace")
    data = dataclasses.replace(data, format="jsonl" if path.suffix == ".jsonl" else "lines")
    settings = Settings(model=small_config(n_vocab=8000), data=data)
    say_cost(path.stat().st_size, lambda: open_store(settings, epath.Path(folder)))


def say_cost(n_bytes: int, function) -> None:
    """Says MB/s, seconds, MB of memory of this process and of the largest of its children, at most, and CPU seconds of
    all."""
    seconds = timed(function)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one
    own = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1000
    print(f"{n_bytes / MB / seconds:.1f} {seconds:.1f} {own:.0f} {used[1].ru_maxrss / 1000:.0f} {cpu:.1f}", flush=True)


def write_lines(path: pathlib.Path, n_bytes: int, cut: int) -> None:
    """Documents of `cut` bytes, a line each; or, for JSON lines, whole files."""
    with path.open("wb") as file:
        for document in corpus(n_bytes):
            if path.suffix == ".jsonl":
                text = document.text.decode("utf-8", errors="replace")
                file.write(json.dumps(dict(text=text), ensure_ascii=False).encode() + b"\n")
                continue
            text = document.text.replace(b"\n", b" ").replace(b"\r", b" ")
            for begin in range(0, len(text), cut):
                file.write(text[begin : begin + cut] + b"\n")


def part_cost(folder: pathlib.Path, n_bytes: int) -> None:
    """Says the CPU seconds that a worker takes for a GB of text, in a gzip file of JSON lines as those of C4 are."""
    path, model, n_text = folder / "a.jsonl.gz", folder / "own.model", 0
    model.write_bytes(train_sentencepiece((document.text for document in corpus(10 * MB)), 8000))
    with gzip.open(path, "wt", compresslevel=6) as file:
        for document in corpus(n_bytes):
            whole = document.text.decode("utf-8", errors="replace")
            for begin in range(0, len(whole), 2200):
                text = whole[begin : begin + 2200]
                n_text += len(text.encode())
                file.write(json.dumps(dict(text=text)) + "\n")
    data = DataSettings(source=str(path), format="jsonl")
    for turn, name in itertools.product(range(2), ("bytes", str(model))):
        vocab, found = load_vocab(name), listing(data)
        store = epath.Path(folder / f"{vocab.name.partition(':')[0]}{turn}")
        task = PartTask.of(store, found.files, signature(found.files), found, data, n_text)
        began = time.process_time()  # of all threads
        write_part(task, vocab, lambda n: None)
        seconds = time.process_time() - began
        print(f"{store.name}: {seconds / n_text * 1e9:.0f} CPU seconds a GB of text, {seconds:.0f} in all", flush=True)


def prepare_alone(folder: pathlib.Path, source: int | pathlib.Path, vocab: str) -> list[float]:
    """A preparation in a process of its own; see `say_cost`. source: a file, or how many bytes of documents."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.speed", f"--workdir={folder}", f"--prepare={source}", f"--vocab={vocab}"]
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
    places = np.random.default_rng(seed).integers([n_steps, 128], size=[n_rows, 2]).tolist()

    def read(step: int, row: int) -> None:
        read_row(split.tokens, plan, row, step * update_len, (step + 1) * update_len)

    read(0, 0)  # the order of the epoch is drawn once
    return n_rows / timed(lambda: [read(*place) for place in places])


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
    parser.add_argument("--small", action="store_true", help="only preparing small documents and JSON lines")
    parser.add_argument("--cost", action="store_true", help="only what a part costs a worker, in CPU seconds")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--vocab", default="bytes", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = pathlib.Path(given.workdir)
    if given.padding:
        padding()
        return
    if given.prepare:
        if given.prepare.isdecimal():
            prepare(folder, int(given.prepare), given.vocab)
        else:
            prepare_file(folder, pathlib.Path(given.prepare), given.vocab)
        return
    folder.mkdir(parents=True)
    print(f"{CORES} cores")
    if given.cost:
        part_cost(folder, given.megabytes * MB)
        return
    if not given.small:
        speed, _, peak, *_ = prepare_alone(folder / "bytes", given.megabytes * MB, "bytes")
        print(f"bytes: {speed:.0f} MB/s, {peak:.0f} MB of memory")
    for cut in (2000, 100):
        path, n_bytes = folder / f"{cut}.txt", 1200 * MB if cut > 1000 else 600 * MB
        write_lines(path, n_bytes, cut)
        for turn in range(2):
            speed, seconds, peak, child, cpu = prepare_alone(folder / f"bytes{cut}.{turn}", path, "bytes")
            print(
                f"bytes, documents of {cut}: {speed:.1f} MB/s in {seconds:.0f} s, {path.stat().st_size / MB / cpu:.1f} "
                f"MB a CPU second; {peak:.0f} + {CORES} x {child:.0f} MB of memory"
            )
        path.unlink()

    model = folder / "own.model"
    model.write_bytes(train_sentencepiece((document.text for document in corpus(10 * MB)), 8000))
    vocab, n_bytes, path = SentencePieceVocab(model), 520 * MB, folder / "pieces.jsonl"  # four parts
    write_lines(path, n_bytes, 0)
    for turn in range(2):
        before = pieces_alone(vocab, n_bytes // 20)
        speed, _, peak, child, _ = prepare_alone(folder / f"pieces{turn}", path, str(model))
        alone = (before + pieces_alone(vocab, n_bytes // 20)) / 2
        print(
            f"SentencePiece: {speed:.1f} MB/s, {peak:.0f} + {CORES} x {child:.0f} MB of memory; the library alone "
            f"{alone:.1f} MB/s, {speed / alone / CORES:.0%} of that times {CORES} cores"
        )
    if given.small:
        return

    import configs.enwik8

    train = resolve(configs.enwik8.get_config()).train
    small = folder / "small"
    prepare_alone(small, 10 * MB, "bytes")
    stores = {"10 MB": TokenStore(small / "store"), f"{given.megabytes} MB": TokenStore(folder / "bytes/store")}
    if given.gigabytes:
        speed, seconds, peak, *_ = prepare_alone(folder / "large", int(given.gigabytes * 1000 * MB), "bytes")
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
