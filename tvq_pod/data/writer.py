"""Writing a token store, document by document, so that it can be broken off at any time and gone on with.

The store grows in a folder NAME.preparing and gets its name when it is whole. Now and then what is there is written
down, in progress.json: how many documents were taken, and how long each array was. Whoever goes on cuts the arrays
to that and takes the documents that follow. In a bucket nothing can be renamed at once: there a store grows
in its place, and is whole when it has its store.json.
"""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator

import filelock
import google_crc32c
import numpy as np
import tensorstore
from etils import epath

from tvq_pod.data import store as stores
from tvq_pod.data.document import printable
from tvq_pod.data.groups import GROUP
from tvq_pod.data.store import ARRAYS, FORMAT, NAMES, SPLITS, TokenStore, array_metadata, arrays_of, crc32c_of, kvstore
from tvq_pod.data.vocab import END_OF_DOC, Vocab, keep_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say

COMMIT_SECONDS = 30.0
IN_FLIGHT = 2  # shards of an array that are being compressed and written


class ArrayWriter:
    """Appends to a one-dimensional zarr3 array, a shard at a time, compressed and hashed in threads; memory use is a
    few shards."""

    def __init__(
        self,
        path: epath.PathLike,
        dtype: np.dtype,
        threads: concurrent.futures.Executor,
        written: dict | None = None,
    ):
        """written: what `commit` returned; the array is cut to that, and goes on. Raises ValueError if it can't."""
        self._dtype = np.dtype(dtype)
        self._shard_len = stores.SHARD_BYTES // self._dtype.itemsize
        self._threads = threads
        self._digests: list[bytes] = []  # SHA-256 of each full shard's elements, little-endian
        self._waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        self._buffer, self._n = np.empty(self._shard_len, self._dtype), 0  # elements of the last shard
        self.length = 0  # elements given so far
        if written is None:
            self._array = tensorstore.open(self._spec(path)).result()
            return
        spec = {"driver": "zarr3", "kvstore": kvstore(path), "fill_missing_data_reads": False}
        self._array = tensorstore.open(spec, read=True, write=True).result()
        self.length = written["length"]
        if self._array.shape[0] < self.length:
            raise ValueError(f"{path} is shorter than progress.json says")
        self._digests = [bytes.fromhex(digest) for digest in written["shards"]]
        self._n = self.length % self._shard_len
        self._buffer[: self._n] = self._array[self.length - self._n : self.length].read().result()
        with _named_errors():
            self._array = self._array.resize(exclusive_max=[self.length]).result()

    def _spec(self, path: epath.PathLike) -> dict:
        inner = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": stores.ZSTD_LEVEL}},
            {"name": "crc32c"},
        ]
        sharding = {"chunk_shape": [stores.CHUNK_BYTES // self._dtype.itemsize], "codecs": inner}
        return {
            "driver": "zarr3",
            "kvstore": kvstore(path),
            "metadata": {
                "data_type": self._dtype.name,
                "shape": [0],
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self._shard_len]}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "fill_value": 0,
            },
            "create": True,
            "delete_existing": True,
            "store_data_equal_to_fill_value": True,
        }

    def append(self, values: np.ndarray) -> None:
        """Adds values [n]; they are cast to the array's dtype."""
        at = 0
        while at < len(values):
            n = min(len(values) - at, self._shard_len - self._n)
            self._buffer[self._n : self._n + n] = values[at : at + n]
            self._n += n
            at += n
            if self._n == self._shard_len:
                self._write_full()
        self.length += len(values)

    def add(self, value: int) -> None:
        """Adds one value: faster than an array of one."""
        self._buffer[self._n] = value
        self._n += 1
        self.length += 1
        if self._n == self._shard_len:
            self._write_full()

    def _write_full(self) -> None:
        begin = self._shard_len * (len(self._digests) + len(self._waiting))
        self._resize(begin + self._shard_len)
        self._waiting.append(self._threads.submit(self._write, self._array, begin, self._buffer))
        self._buffer, self._n = np.empty(self._shard_len, self._dtype), 0
        if len(self._waiting) > IN_FLIGHT:
            self._digests.append(self._waiting.popleft().result())

    def _resize(self, length: int) -> None:
        with _named_errors():
            self._array = self._array.resize(exclusive_max=[length], expand_only=True).result()

    def _write(self, array: tensorstore.TensorStore, begin: int, values: np.ndarray) -> bytes:
        with _named_errors():
            written = array[begin : begin + len(values)].write(values)
            digest = self._digest(values)
            written.result()
        return digest

    def _digest(self, values: np.ndarray) -> bytes:
        return hashlib.sha256(values.astype(self._dtype.newbyteorder("<"), copy=False).data).digest()

    def commit(self) -> dict:
        """Writes all there is. Returns what it takes to go on from here."""
        while self._waiting:
            self._digests.append(self._waiting.popleft().result())
        if self._n:
            begin = self._shard_len * len(self._digests)
            self._resize(begin + self._n)
            self._write(self._array, begin, self._buffer[: self._n])
        return dict(length=self.length, shards=[digest.hex() for digest in self._digests])

    def close(self) -> bytes:
        """Writes what is left. Returns the SHA-256 of the digests of all shards."""
        self.commit()
        last = [self._digest(self._buffer[: self._n])] if self._n else []
        return hashlib.sha256(b"".join(self._digests + last)).digest()


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        is_full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        remedy = "make room, or give another" if is_full else "give a folder that can be written"
        raise UserError(f"config.data.store: can't be written ({str(error)[-200:]}); {remedy}") from error


class SplitWriter:
    """Writes one split's three arrays."""

    def __init__(
        self,
        path: epath.Path,
        token_dtype: np.dtype,
        threads: concurrent.futures.Executor,
        written: dict | None = None,
    ):
        """written: what `commit` returned."""
        arrays = written["arrays"] if written else dict.fromkeys(arrays_of(path.name))
        dtypes = dict(tokens=token_dtype, starts=np.dtype(np.int64), doc_bytes=np.dtype(np.int64), names=np.dtype("u1"))
        self._arrays = {name: ArrayWriter(path / name, dtypes[name], threads, done) for name, done in arrays.items()}
        self._sums = collections.Counter(written["sums"] if written else {})
        self._groups: list[int] = written["groups"] if written else []  # where each group of documents begins
        self._begins = True  # whether the next token is a document's first

    def append(self, ids: np.ndarray) -> None:
        """Adds token ids [n] to the document that is being written."""
        if self._begins:
            if self._arrays["starts"].length % GROUP == 0:
                self._groups.append(self._arrays["tokens"].length)
            self._arrays["starts"].add(self._arrays["tokens"].length)
            self._begins = False
        self._arrays["tokens"].append(ids)

    def end(self, n_bytes: int, n_words: int = 0, name: str = "") -> None:
        """Ends the document, of whose text these are the sizes; adds its end-of-document. name: kept if held out."""
        self._arrays["tokens"].add(END_OF_DOC)
        self._arrays["doc_bytes"].add(n_bytes)
        if NAMES in self._arrays:
            self._arrays[NAMES].append(np.frombuffer(f"{printable(name)}\n".encode(), np.uint8))
        self._sums.update(n_bytes=n_bytes, n_words=n_words)
        self._begins = True

    def commit(self) -> dict:
        """Between documents: writes all there is, and returns what it takes to go on from here."""
        arrays = {name: array.commit() for name, array in self._arrays.items()}
        return dict(arrays=arrays, sums=dict(self._sums), groups=list(self._groups))

    def close(self) -> dict:
        """Finishes the arrays and returns the split's entry in store.json."""
        n_documents, n_tokens = self._arrays["starts"].length, self._arrays["tokens"].length
        self._arrays["starts"].add(n_tokens)
        digests = {name: array.close() for name, array in self._arrays.items()}
        digest = hashlib.sha256(b"".join(digests[name] for name in ARRAYS))
        return dict(
            n_documents=n_documents,
            n_tokens=n_tokens,
            n_bytes=self._sums["n_bytes"],
            n_words=self._sums["n_words"],
            sha256=digest.hexdigest(),
            groups=dict(n_documents=GROUP, starts=self._groups),
        )


class StoreWriter:
    """Writes a store at `path`; a context, in which `splits` can be added to, until `finish`.

    Attributes: splits, by name; n_taken and crc_taken, of the documents of the corpus that were taken before, by a
    writer that was broken off: how many, and a CRC-32C of them all.
    """

    def __init__(self, path: epath.PathLike, vocab: Vocab, made_with: dict):
        """made_with: all that the documents depend on, besides the vocabulary; kept in store.json."""
        check_free(path)
        self._path, self._vocab, self._made_with = followed(path), vocab, made_with
        in_place = is_bucket(path) or os.path.ismount(self._path)
        self._draft = self._path if in_place else self._path.with_name(f"{self._path.name}.preparing")
        self._progress = self._draft / "progress.json"
        self._threads = concurrent.futures.ThreadPoolExecutor(len(ARRAYS))
        self._identity = dict(vocab=vocab.name, n_vocab=vocab.n_vocab, **made_with)
        self._committed = time.monotonic()

    def __enter__(self) -> "StoreWriter":
        written = self._read_progress()
        try:
            self._open(written)
        except (ValueError, KeyError) as error:
            if not written:
                raise
            say(f"WARNING: {self._draft} is damaged ({str(error)[:200]}): begins anew")
            self._open(None)
        if self._draft == self._path and not written:  # so that a folder with a beginning in it is known as ours
            self._commit(0, 0)
        return self

    def _open(self, written: dict | None) -> None:
        token_dtype = np.dtype(np.uint16 if self._vocab.n_vocab <= 2**16 else np.uint32)
        if not written and self._draft.exists() and self._draft != self._path:
            self._draft.rmtree()
        self.n_taken = written["n_taken"] if written else 0
        self.crc_taken = written["crc_taken"] if written else 0
        self.splits = {
            split: SplitWriter(self._draft / split, token_dtype, self._threads, written and written["splits"][split])
            for split in SPLITS
        }

    def begin_anew(self) -> None:
        """Forgets what was there: the corpus is not what it was."""
        self._progress.unlink(missing_ok=True)
        self._open(None)

    def _read_progress(self) -> dict | None:
        try:
            written = json.loads(self._progress.read_text())
            if written.pop("crc32c") == crc32c_of(written) and written["identity"] == self._identity:
                return written
            say(f"{self._draft} was begun with other settings, or is damaged: begins anew")
        except FileNotFoundError:
            pass
        except OSError as error:  # it may be there, and be of use, another time
            raise UserError(f"config.data.store: {self._progress} can't be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            say(f"WARNING: {self._progress} is damaged: begins anew")
        return None

    def may_commit(self, n_taken: int, crc_taken: int) -> None:
        """Call between documents: writes down now and then how far it came: see the attributes."""
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self._commit(n_taken, crc_taken)

    def _commit(self, n_taken: int, crc_taken: int) -> None:
        written = dict(
            identity=self._identity,
            n_taken=n_taken,
            crc_taken=crc_taken,
            splits={name: split.commit() for name, split in self.splits.items()},
        )
        with _named_errors():
            write_whole(self._progress, json.dumps(written | dict(crc32c=crc32c_of(written))), sync=True)
        self._committed = time.monotonic()

    def finish(self, **more) -> TokenStore:
        """Writes store.json, with `more` in it, and renames the store. Raises UserError if there is nothing in it."""
        entries = {name: split.close() for name, split in self.splits.items()}
        n_held_out = sum(entry["n_documents"] for entry in entries.values())
        if not entries["train"]["n_documents"] and not (n_held_out and more.get("own_splits")):
            raise UserError(
                f"config.data.source={self._made_with.get('source')}: has no document to train on, {n_held_out} to "
                "validate and test; give a corpus with text in it, or smaller config.data.validation_share and "
                "test_share"
            )
        contents = [FORMAT, self._vocab.name, [entries[split]["sha256"] for split in SPLITS]]
        meta = dict(
            format=FORMAT,
            vocab=self._vocab.name,
            n_vocab=self._vocab.n_vocab,
            made_with=self._made_with,
            fingerprint=hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
            splits=entries,
            arrays={
                f"{split}/{array}": google_crc32c.value(array_metadata(self._draft, f"{split}/{array}"))
                for split in SPLITS
                for array in arrays_of(split)
            },
            **more,
        )
        meta["crc32c"] = crc32c_of(meta)
        with _named_errors():
            keep_vocab(self._vocab, self._draft)
            write_whole(self._draft / "store.json", json.dumps(meta, indent=2) + "\n")
            if self._draft != self._path:
                os.rename(self._draft, self._path)  # onto an empty folder, too
            (self._path / "progress.json").unlink(missing_ok=True)
        return TokenStore(self._path)

    def __exit__(self, *error) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._draft != self._path and not self._progress.exists() and not TokenStore.exists(self._draft):
            self._draft.rmtree(missing_ok=True)  # nothing to go on from


@contextlib.contextmanager
def only_one(path: epath.PathLike) -> Iterator[None]:
    """Waits while another process of this host makes the store at `path`. Buckets can't be locked so: there the run's
    own lock must do."""
    path = epath.Path(path)
    if is_bucket(path):
        yield
        return
    path = followed(path)
    file = path.with_name(f"{path.name}.lock")
    # The kernel's own lock or an error: the package's replacement would outlive a process that is killed.
    lock = filelock.FileLock(file, fallback_to_soft=False)
    with _named_errors():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            say(f"waits: another process prepares {path}")
            lock.acquire()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is released: whoever waits finds its file gone, and makes the next
        lock.release()


def adopted(path: epath.PathLike, vocab: Vocab, made_with: dict) -> TokenStore | None:
    """A store that was whole when its writer was killed, and only lacked its name; None if there is none."""
    path = followed(path)
    draft = path.with_name(f"{path.name}.preparing")
    if is_bucket(path) or not TokenStore.exists(draft):
        return None
    meta = TokenStore(draft).meta
    if (meta["vocab"], meta["made_with"]) != (vocab.name, made_with):
        return None
    check_free(path)
    with _named_errors():
        os.rename(draft, path)
        (path / "progress.json").unlink(missing_ok=True)
    return TokenStore(path)


def followed(path: epath.PathLike) -> epath.Path:
    """Where a symbolic link leads to, or the path itself if it is none. Raises UserError if that is nothing."""
    if is_bucket(path) or not os.path.islink(path):
        return epath.Path(path)
    target = os.path.realpath(path)
    if not os.path.exists(target):
        raise UserError(
            f"config.data.store={path}: is a symbolic link to {target}, which does not exist; "
            "make that folder (or mount its disk), or remove the link"
        )
    return epath.Path(target)


def check_free(path: epath.PathLike) -> None:
    """Raises UserError if there is something at `path`: a store is made only where nothing is."""
    path = followed(path)
    if not path.exists() or (path / "progress.json").exists():
        return
    if not path.is_dir() or any(entry.name != "lost+found" for entry in path.iterdir()):
        raise UserError(
            f"config.data.store={path}: holds something that is no whole token store; remove it, or give another folder"
        )
