"""Writing a token store, document by document, so that it can be interrupted at any time and resumed.

The store grows in a folder NAME.preparing, which is renamed when the store is complete. The number of documents taken
and the length of each array are written to progress.json regularly. A process that resumes cuts the arrays to these
lengths and takes the next documents. A folder in a bucket can't be renamed atomically: there the store grows in its
final place, and is complete when it has its store.json.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import time
from collections.abc import Iterable

import google_crc32c
import numpy as np
from etils import epath

from tvq_pod.data.arrays import ArrayWriter, named_errors
from tvq_pod.data.document import printable
from tvq_pod.data.groups import GROUP
from tvq_pod.data.place import check_free, followed
from tvq_pod.data.store import ARRAYS, FILES, FORMAT, NAMES, SPLITS, TokenStore, array_metadata, arrays_of, crc32c_of
from tvq_pod.data.vocab import END_OF_DOC, Vocab, keep_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say

COMMIT_SECONDS = 30.0


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

    def append_documents(
        self, ids: np.ndarray, n_tokens: np.ndarray, n_bytes: np.ndarray, names: Iterable[str]
    ) -> None:
        """Adds complete documents, while no other is being written. ids: those of all documents, with their
        end-of-document tokens. n_tokens, n_bytes: int64 [n], of each document. names: of each document; used if the
        split keeps names."""
        first, begin = self._arrays["starts"].length, self._arrays["tokens"].length
        starts = begin + np.cumsum(n_tokens) - n_tokens
        self._groups += starts[-first % GROUP :: GROUP].tolist()
        self._arrays["starts"].append(starts)
        self._arrays["tokens"].append(ids)
        self._arrays["doc_bytes"].append(n_bytes)
        if NAMES in self._arrays:
            lines = "".join(f"{printable(name)}\n" for name in names)
            self._arrays[NAMES].append(np.frombuffer(lines.encode(), np.uint8))
        self._sums.update(n_bytes=int(n_bytes.sum()))

    def end(self, n_bytes: int, n_words: int = 0, name: str = "") -> None:
        """Ends the document and adds its end-of-document. n_bytes, n_words: of its text. name: kept if held out."""
        self._arrays["tokens"].add(END_OF_DOC)
        self._arrays["doc_bytes"].add(n_bytes)
        if NAMES in self._arrays:
            self._arrays[NAMES].append(np.frombuffer(f"{printable(name)}\n".encode(), np.uint8))
        self._sums.update(n_bytes=n_bytes, n_words=n_words)
        self._begins = True

    def commit(self) -> dict:
        """Writes all documents so far and returns what is needed to resume here. Call it between documents."""
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
    """Writes a store at `path`. It is a context manager, inside which `splits` can be added to until `finish`.

    Attributes: splits: by name; n_taken, crc_taken: the number of documents that an interrupted writer took from the
    corpus, and their CRC-32C.
    """

    def __init__(self, path: epath.PathLike, vocab: Vocab, made_with: dict, is_part: bool = False):
        """made_with: all that the documents depend on besides the vocabulary; kept in store.json. is_part: whether this
        is one of several parts, which may have no training documents and needs no vocabulary file."""
        check_free(path)
        self._path, self._vocab, self._made_with, self._is_part = followed(path), vocab, made_with, is_part
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
            say(f"WARNING: {self._draft} is damaged ({str(error)[:200]}); starting over")
            self._open(None)
        if self._draft == self._path and not written:  # marks the folder of an unfinished store as ours
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
        """Discards everything written so far, after the corpus has changed."""
        self._progress.unlink(missing_ok=True)
        self._open(None)

    def _read_progress(self) -> dict | None:
        try:
            written = json.loads(self._progress.read_text())
            if written.pop("crc32c") == crc32c_of(written) and written["identity"] == self._identity:
                return written
            say(f"{self._draft} was begun with other settings, or is damaged; starting over")
        except FileNotFoundError:
            pass
        except OSError as error:  # it may be readable, and useful, later
            raise UserError(f"config.data.store: {self._progress} can't be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            say(f"WARNING: {self._progress} is damaged; starting over")
        return None

    def may_commit(self, n_taken: int, crc_taken: int) -> None:
        """Records the progress (see the attributes) every COMMIT_SECONDS. Call it between documents."""
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self._commit(n_taken, crc_taken)

    def _commit(self, n_taken: int, crc_taken: int) -> None:
        written = dict(
            identity=self._identity,
            n_taken=n_taken,
            crc_taken=crc_taken,
            splits={name: split.commit() for name, split in self.splits.items()},
        )
        with named_errors():
            write_whole(self._progress, json.dumps(written | dict(crc32c=crc32c_of(written))), sync=True)
        self._committed = time.monotonic()

    def finish(self, files: str = "", **more) -> TokenStore:
        """Writes store.json, with the entries `more`, and renames the store. files: the content of files.json; "": no
        such file. Raises UserError as `check_documents` does."""
        entries = {name: split.close() for name, split in self.splits.items()}
        if not self._is_part:
            check_documents(entries, self._made_with, more.get("own_splits", False))
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
        with named_errors():
            if not self._is_part:
                keep_vocab(self._vocab, self._draft)
            if files:
                write_whole(self._draft / FILES, files)
            write_whole(self._draft / "store.json", json.dumps(meta, indent=2) + "\n")
            if self._draft != self._path:
                os.rename(self._draft, self._path)  # also works onto an empty folder
            (self._path / "progress.json").unlink(missing_ok=True)
        return TokenStore(self._path)

    def __exit__(self, *error) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._draft != self._path and not self._progress.exists() and not TokenStore.exists(self._draft):
            self._draft.rmtree(missing_ok=True)  # nothing to resume from


def check_documents(entries: dict, made_with: dict, own_splits: bool) -> None:
    """Raises UserError if a store has no documents, or no training documents although its corpus did not say so.
    entries: of the splits, in store.json."""
    n_held_out = sum(entry["n_documents"] for entry in entries.values())
    if not entries["train"]["n_documents"] and not (n_held_out and own_splits):
        raise UserError(
            f"config.data.source={made_with.get('source')}: has no documents for training, and {n_held_out} for "
            "validation and test; give a corpus with text in it, or smaller config.data.validation_share and "
            "test_share"
        )
