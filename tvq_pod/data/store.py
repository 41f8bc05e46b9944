"""The token store: a corpus as arrays of token ids on disk, or in a bucket.

    STORE/store.json             vocabulary, sizes, fingerprint; written last, so a store that has it is whole
    STORE/vocab.model            the SentencePiece model, if there is one
    STORE/SPLIT/tokens           uint16 or uint32 [n_tokens]: documents end to end, each with an end-of-document
    STORE/SPLIT/starts           int64 [n_documents + 1]: where each begins; the last entry is n_tokens
    STORE/SPLIT/doc_bytes        int64 [n_documents]: bytes of each document's text, for bits per byte

Arrays are zarr3, in shards of compressed and checksummed chunks, through TensorStore. A missing or damaged chunk is an
error when it is read, never zeros.
"""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable

import google_crc32c
import numpy as np
import tensorstore
from etils import epath

from tvq_pod.data.vocab import END_OF_DOC, ByteVocab, SentencePieceVocab
from tvq_pod.errors import UserError
from tvq_pod.paths import is_bucket

SPLITS = ("train", "validation", "test")
FORMAT = 2
CHUNK_BYTES = 64 * 1024
SHARD_BYTES = 16 * 1024 * 1024
CACHE_BYTES = 256 * 1024 * 1024
ARRAYS = ("tokens", "starts", "doc_bytes")


def kvstore(path: epath.PathLike) -> str | dict:
    """What TensorStore calls a path: gs:// stays, anything else is a local folder."""
    path = str(path)
    return f"{path}/" if is_bucket(path) else {"driver": "file", "path": f"{os.path.abspath(path)}/"}


class ArrayWriter:
    """Appends to a one-dimensional zarr3 array, a shard at a time; memory use is about one shard."""

    def __init__(self, path: epath.PathLike, dtype: np.dtype):
        self._dtype = np.dtype(dtype)
        self._shard_len = SHARD_BYTES // self._dtype.itemsize
        self._pending: list[np.ndarray] = []
        self._n_pending = 0
        self.length = 0  # elements given so far
        self.digest = hashlib.sha256()  # of the elements, little-endian
        chunk = {"name": "regular", "configuration": {"chunk_shape": [self._shard_len]}}
        inner = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 3}},
            {"name": "crc32c"},
        ]
        sharding = {"chunk_shape": [CHUNK_BYTES // self._dtype.itemsize], "codecs": inner}
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(path),
            "metadata": {
                "data_type": self._dtype.name,
                "shape": [0],
                "chunk_grid": chunk,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "fill_value": 0,
            },
            "create": True,
            "store_data_equal_to_fill_value": True,
        }
        self._array = tensorstore.open(spec).result()

    def append(self, values: np.ndarray) -> None:
        """Adds values [n]; they are cast to the array's dtype."""
        values = np.ascontiguousarray(values, self._dtype)
        self.digest.update(values.astype(self._dtype.newbyteorder("<"), copy=False).data)
        self._pending.append(values)
        self._n_pending += len(values)
        self.length += len(values)
        if self._n_pending >= self._shard_len:
            self._write(self._n_pending - self._n_pending % self._shard_len)

    def close(self) -> None:
        """Writes what is left."""
        self._write(self._n_pending)

    def _write(self, n: int) -> None:
        if not n:
            return
        values = np.concatenate(self._pending)
        begin = self.length - self._n_pending
        try:
            self._array = self._array.resize(exclusive_max=[begin + n]).result()
            self._array[begin : begin + n].write(values[:n]).result()
        except ValueError as error:
            raise UserError(
                f"config.data.store: can't be written ({str(error)[-200:]}); make room, or give another"
            ) from error
        self._pending, self._n_pending = [values[n:]], self._n_pending - n


class SplitWriter:
    """Writes one split's three arrays."""

    def __init__(self, path: epath.Path, token_dtype: np.dtype):
        self._tokens = ArrayWriter(path / "tokens", token_dtype)
        self._starts = ArrayWriter(path / "starts", np.int64)
        self._doc_bytes = ArrayWriter(path / "doc_bytes", np.int64)
        self._n_bytes = 0

    def append(self, token_ids: np.ndarray, n_bytes: int) -> None:
        """Adds a document of `token_ids` [n], whose text has `n_bytes`; the end-of-document is added here."""
        self._starts.append(np.array([self._tokens.length]))
        self._tokens.append(token_ids)
        self._tokens.append(np.array([END_OF_DOC]))
        self._doc_bytes.append(np.array([n_bytes]))
        self._n_bytes += n_bytes

    def close(self) -> dict:
        """Finishes the arrays and returns the split's entry in store.json."""
        n_documents = self._starts.length
        self._starts.append(np.array([self._tokens.length]))
        digest = hashlib.sha256()
        for writer in (self._tokens, self._starts, self._doc_bytes):
            writer.close()
            digest.update(writer.digest.digest())
        return dict(
            n_documents=n_documents, n_tokens=self._tokens.length, n_bytes=self._n_bytes, sha256=digest.hexdigest()
        )


def split_of(text: bytes, validation_share: float, test_share: float) -> str:
    """The split of a document: drawn by a hash of its content, so equal documents never face each other in two splits,
    and adding documents moves none."""
    draw = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
    if draw < validation_share:
        return "validation"
    return "test" if draw < validation_share + test_share else "train"


def write_store(
    path: epath.PathLike,
    documents: Iterable[tuple[bytes, np.ndarray]],
    vocab: ByteVocab | SentencePieceVocab,
    *,
    validation_share: float,
    test_share: float,
    source: str,
    made_with: dict | None = None,
) -> "TokenStore":
    """Writes the (text, token ids) of documents as a store, and opens it.

    The store appears under its name only when it is whole: a killed process leaves at most a folder NAME.writing-*.
    made_with: more settings that the documents depend on; kept in store.json. Raises UserError if there is something
    else at `path`, or no document is left to train on.
    """
    path = epath.Path(path)
    check_free(path)
    # In a bucket nothing can be renamed at once: there a store is whole when it has its store.json, written last.
    draft = path if is_bucket(path) else path.with_name(f"{path.name}.writing-{secrets.token_hex(4)}")
    try:
        token_dtype = np.dtype(np.uint16 if vocab.n_vocab <= 2**16 else np.uint32)
        splits = {split: SplitWriter(draft / split, token_dtype) for split in SPLITS}
        for text, token_ids in documents:
            splits[split_of(text, validation_share, test_share)].append(token_ids, len(text))
        entries = {split: writer.close() for split, writer in splits.items()}
        if not entries["train"]["n_documents"]:
            n_held_out = sum(entry["n_documents"] for entry in entries.values())
            raise UserError(
                f"config.data.source={source}: has no document to train on, {n_held_out} to validate and test; "
                "give a corpus with text in it, or smaller config.data.validation_share and test_share"
            )
        fingerprint = hashlib.sha256(
            json.dumps([FORMAT, vocab.name, [entries[split]["sha256"] for split in SPLITS]]).encode()
        ).hexdigest()
        meta = dict(
            format=FORMAT,
            source=source,
            made_with=made_with or {},
            vocab=vocab.name,
            n_vocab=vocab.n_vocab,
            validation_share=validation_share,
            test_share=test_share,
            fingerprint=fingerprint,
            splits=entries,
        )
        if isinstance(vocab, SentencePieceVocab):
            (draft / "vocab.model").write_bytes(vocab.model)
        meta["arrays"] = {name: google_crc32c.value(_array_metadata(draft, name)) for name in _array_names()}
        meta["crc32c"] = _crc32c(meta)
        (draft / "store.json").write_text(json.dumps(meta, indent=2) + "\n")
        if draft != path:
            _give_name(draft, path)
    except BaseException:
        if draft != path:
            draft.rmtree(missing_ok=True)
        raise
    return TokenStore(path)


def _array_names() -> list[str]:
    return [f"{split}/{array}" for split in SPLITS for array in ARRAYS]


def _array_metadata(path: epath.Path, name: str) -> bytes:
    """Shape, dtype and codecs of an array, which have no checksum of their own."""
    return (path / name / "zarr.json").read_bytes()


def _crc32c(meta: dict) -> int:
    """Of everything in store.json but itself."""
    others = {name: value for name, value in meta.items() if name != "crc32c"}
    return google_crc32c.value(json.dumps(others, sort_keys=True).encode())


def check_free(path: epath.PathLike) -> None:
    """Raises UserError if there is something at `path`: a store is made only where nothing is."""
    path = epath.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"config.data.store={path}: holds something that is no whole token store; remove it, or give another folder"
        )


def _give_name(draft: epath.Path, path: epath.Path) -> None:
    """Renames a finished store; if another process was first, that one's store stays and ours goes."""
    try:
        os.rename(draft, path)  # onto an empty folder, too
    except OSError:
        if not TokenStore.exists(path):
            raise
        draft.rmtree()


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, open for reading."""

    tokens: tensorstore.TensorStore  # [n_tokens]
    starts: np.ndarray  # int64 [n_documents + 1]
    doc_bytes: np.ndarray  # int64 [n_documents]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end-of-document included: int64 [n_documents]."""
        return np.diff(self.starts)


class TokenStore:
    """A store, open for reading. Raises UserError if there is none, or it is no store.

    Attributes: path, vocab_name, n_vocab, fingerprint (SHA-256 of everything a batch can depend on), meta (store.json).
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        try:
            self.meta = json.loads((self.path / "store.json").read_text())
            known = self.meta["format"] == FORMAT
            self.vocab_name, self.n_vocab = self.meta["vocab"], self.meta["n_vocab"]
            self.fingerprint = self.meta["fingerprint"]
            if known and self.meta["crc32c"] != _crc32c(self.meta):
                raise ValueError
        except OSError as error:
            raise UserError(f"config.data.store={path}: is no token store ({error.strerror}: store.json)") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"config.data.store={path}: {self.path / 'store.json'} is damaged; prepare the store anew elsewhere"
            ) from None
        if not known:
            raise UserError(f"config.data.store={path}: has format {self.meta['format']}; this version reads {FORMAT}")
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._splits: dict[str, Split] = {}

    @staticmethod
    def exists(path: epath.PathLike) -> bool:
        """Whether there is a whole store."""
        return (epath.Path(path) / "store.json").is_file()

    def vocab(self) -> ByteVocab | SentencePieceVocab:
        """The vocabulary that the tokens are in."""
        return ByteVocab() if self.vocab_name == ByteVocab.name else SentencePieceVocab(self.path / "vocab.model")

    def tokens_per_byte(self, split: str) -> float:
        """Tokens, end-of-documents included, per byte of text."""
        entry = self.meta["splits"][split]
        return entry["n_tokens"] / max(entry["n_bytes"], 1)

    def split(self, name: str) -> Split:
        """Opens a split. Raises UserError if it has no document, or is damaged."""
        if name not in self._splits:
            if not self.meta["splits"][name]["n_documents"]:
                raise UserError(
                    f"--split={name}: no document of {self.path} fell into it; take a larger corpus or share"
                )
            try:
                tokens, starts, doc_bytes = (self._open(f"{name}/{array}") for array in ARRAYS)
                split = Split(tokens, starts.read().result(), doc_bytes.read().result())
                entry = self.meta["splits"][name]
                n_tokens, n_documents = entry["n_tokens"], entry["n_documents"]
                found = (tokens.shape[0], len(split.starts), int(split.starts[-1]), len(split.doc_bytes))
                if found != (n_tokens, n_documents + 1, n_tokens, n_documents):
                    raise ValueError(f"{self.path / name} has not the documents of store.json")
                self._splits[name] = split
            except (OSError, ValueError) as error:
                raise UserError(
                    f"config.data.store={self.path}: is damaged ({str(error)[:300]}); prepare it anew elsewhere"
                ) from None
        return self._splits[name]

    def _open(self, name: str) -> tensorstore.TensorStore:
        known = self.meta.get("arrays", {}).get(name)  # None: made by an older version
        if known is not None and google_crc32c.value(_array_metadata(self.path, name)) != known:
            raise ValueError(f"{self.path / name / 'zarr.json'} has changed (CRC-32C)")
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(self.path / name),
            "fill_missing_data_reads": False,
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        return tensorstore.open(spec, read=True, context=self._context).result()
