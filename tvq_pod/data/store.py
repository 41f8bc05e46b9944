"""The token store: a corpus as arrays of token ids on disk, or in a bucket. writer.py writes it.

A store of one part:

    STORE/store.json             vocabulary, sizes, fingerprint, and where groups of documents begin (see groups.py);
                                 written last, so a store that has it is complete
    STORE/vocab.model, .json     the SentencePiece model or Hugging Face tokenizer, if there is one
    STORE/SPLIT/tokens           uint16 or uint32 [n_tokens]: documents, each with an end-of-document token
    STORE/SPLIT/starts           int64 [n_documents + 1]: where each begins; the last entry is n_tokens
    STORE/SPLIT/doc_bytes        int64 [n_documents]: bytes of each document's text, for bits per byte
    STORE/SPLIT/names            uint8 [n]: names of documents, UTF-8, one per line; only validation and test
    STORE/files.json             the files that were read, for --append

A store of several parts, one after the other:

    STORE/store.json             the same for all parts, and each part's folder, sizes, fingerprint and checksum
    STORE/part-00000             each part's own store.json, files.json and SPLIT/...

If a store of one part is appended to, its first part stays where it was, beside the folders of the others.

Arrays are zarr3, in shards of compressed and checksummed chunks, through TensorStore. A missing or damaged chunk is an
error when it is read, never zeros.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator

import google_crc32c
import numpy as np
import tensorstore
from etils import epath

from tvq_pod.config.settings import DataSettings, Settings, generated
from tvq_pod.data.groups import DocumentStarts, group_bounds, in_memory
from tvq_pod.data.parted import Array, end_to_end, joined
from tvq_pod.data.vocab import Vocab, kept_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.paths import BUCKET, is_bucket

# The settings that documents depend on, besides the vocabulary
MADE_WITH = (
    *("source", "format", "text_field", "glob", "invalid_utf8", "validation_share", "test_share"),
    *("exclude", "hidden", "bad_rows", "holdout"),
)
RECALL_MADE_WITH = (  # the same, for a generated corpus
    *("recall_documents", "recall_held_out", "recall_bytes", "recall_pairs", "recall_keys", "recall_values"),
    *("recall_key_bytes", "recall_smaller", "recall_seed"),
)
# Settings that stores of older versions don't record, with the values that fit those stores
LATER = dict(recall_smaller=0, exclude="", hidden=False, bad_rows="error", holdout="auto")
SPLITS = ("train", "validation", "test")
FORMAT, PARTED = 2, 3  # of store.json, for one part and for several
THREADS = 32  # that check parts when a store is opened
CHUNK_BYTES = 64 * 1024
SHARD_BYTES = 16 * 1024 * 1024
ZSTD_LEVEL = 1
CACHE_BYTES = 256 * 1024 * 1024
BUCKET_REQUESTS = 256  # at the same time: a batch reads a few places of a bucket for each row
ARRAYS = ("tokens", "starts", "doc_bytes")
FILES = "files.json"  # which files a store or part was made from
NAMES = "names"  # an array of bytes that no batch depends on, so it is not part of the fingerprint


def made_with(data: DataSettings) -> dict:
    """Returns all settings that documents depend on, besides the vocabulary."""
    names = (*MADE_WITH, *(RECALL_MADE_WITH if generated(data.format, data.source) else ()))
    return {name: getattr(data, name) for name in names}


def same_settings(there: dict) -> dict:
    """Returns the settings that a store or vocabulary was made with, including those that its version did not have."""
    later = {name: value for name, value in LATER.items() if name in MADE_WITH or "recall_bytes" in there}
    return later | there


def kvstore(path: epath.PathLike) -> dict:
    """Returns TensorStore's spec of a folder. (In a URL, % and ? in a name would have another meaning.)"""
    path = str(path)
    if is_bucket(path):
        bucket, _, folder = path.removeprefix(BUCKET).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{folder}/" if folder else ""}
    return {"driver": "file", "path": f"{os.path.abspath(path)}/"}


def split_of(text: bytes | memoryview, validation_share: float, test_share: float) -> str:
    """Returns the split of a document, drawn by a hash of its content: equal documents are always in the same split,
    and adding documents moves none."""
    draw = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
    if draw < validation_share:
        return "validation"
    return "test" if draw < validation_share + test_share else "train"


def arrays_of(split: str) -> tuple[str, ...]:
    """Returns the names of a split's arrays."""
    return ARRAYS if split == "train" else (*ARRAYS, NAMES)


def array_metadata(path: epath.Path, name: str) -> bytes:
    """Returns the shape, dtype and codecs of an array as stored; they have no checksum of their own."""
    return (path / name / "zarr.json").read_bytes()


def crc32c_of(meta: dict) -> int:
    """Returns the CRC-32C of everything in a JSON object but its own entry crc32c."""
    others = {name: value for name, value in meta.items() if name != "crc32c"}
    return google_crc32c.value(json.dumps(others, sort_keys=True).encode())


@dataclasses.dataclass(frozen=True)
class Part:
    """The documents of one store in a mixture. first_document, n_documents: their range in the mixture. weight: the
    store's share of the tokens read."""

    first_document: int
    n_documents: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """The weights of a mixture's stores, in `parts`, from first_step on."""

    first_step: int
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split, open for reading."""

    tokens: Array  # [n_tokens]
    documents: DocumentStarts
    bytes_on_disk: np.ndarray | Array  # int64 [n_documents]
    parts: tuple[Part, ...] = ()  # of a mixture
    stages: tuple[Stage, ...] = ()  # of a mixture whose weights change

    @property
    def starts(self) -> np.ndarray:
        """The start of each document, and the end, in memory: int64 [n_documents + 1]."""
        return self.documents.whole

    @functools.cached_property
    def doc_bytes(self) -> np.ndarray:
        """The number of bytes of each document's text, in memory: int64 [n_documents]."""
        return np.asarray(self.bytes_on_disk)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document, including its end-of-document: int64 [n_documents]."""
        return np.diff(self.starts)


class TokenStore:
    """A store, open for reading. Raises UserError if it does not exist, or is not a store.

    Attributes: path, vocab_name, n_vocab, fingerprint (SHA-256 of everything a batch can depend on), meta (store.json).
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        try:
            self.meta = json.loads((self.path / "store.json").read_text())
            known = self.meta["format"] in (FORMAT, PARTED)
            self.vocab_name, self.n_vocab = self.meta["vocab"], self.meta["n_vocab"]
            self.fingerprint = self.meta["fingerprint"]
            if known and self.meta["crc32c"] != crc32c_of(self.meta):
                raise ValueError
        except OSError as error:
            raise UserError(f"config.data.store={path}: is not a token store ({error.strerror}: store.json)") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"config.data.store={path}: {self.path / 'store.json'} is damaged; prepare the store again "
                "in another folder"
            ) from None
        if not known:
            raise UserError(f"config.data.store={path}: has format {self.meta['format']}; this version reads {FORMAT}")
        self._context = tensorstore.Context(
            {"cache_pool": {"total_bytes_limit": CACHE_BYTES}, "gcs_request_concurrency": {"limit": BUCKET_REQUESTS}}
        )
        self._splits: dict[str, Split] = {}

    @staticmethod
    def exists(path: epath.PathLike) -> bool:
        """Returns whether there is a complete store."""
        return (epath.Path(path) / "store.json").is_file()

    def vocab(self) -> Vocab:
        """Returns the vocabulary of the tokens."""
        return kept_vocab(self.path)

    @property
    def recall_values(self) -> int:
        """The number of values that a generated corpus draws from; 0 for another corpus."""
        made = self.meta.get("made_with", {})
        return made.get("recall_values", 0)

    def tokens_per_byte(self, split: str) -> float:
        """Returns the number of tokens, end-of-document tokens included, per byte of text."""
        entry = self.meta["splits"][split]
        return entry["n_tokens"] / max(entry["n_bytes"], 1)

    def split(self, name: str) -> Split:
        """Opens a split. Raises UserError if it has no documents or is damaged."""
        if name not in self._splits:
            if not self.meta["splits"][name]["n_documents"]:
                if name == "train":
                    raise UserError(
                        f"config.data.store={self.path}: is for evaluation only, since it has no training documents; "
                        "give another store, or a corpus with training documents"
                    )
                raise UserError(
                    f"--split={name}: no document of {self.path} fell into it; give a larger corpus, or "
                    f"raise config.data.{name}_share"
                )
            with self._damage():
                entries = [part for part in self.parts if part.splits[name]["n_documents"]]
                with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
                    list(threads.map(self._check_part, entries))
                    parts = list(threads.map(functools.partial(self._part_of_split, name), entries))
            tokens, documents, doc_bytes = zip(*parts, strict=True)
            self._splits[name] = Split(end_to_end(tokens), joined(documents), end_to_end(doc_bytes))
        return self._splits[name]

    def _part_of_split(self, name: str, part: "StorePart") -> tuple[tensorstore.TensorStore, DocumentStarts, Array]:
        """Returns the tokens, starts and doc_bytes of a part."""
        tokens, starts, doc_bytes = (self._open(part, f"{name}/{array}") for array in ARRAYS)
        entry, n_documents = part.splits[name], part.splits[name]["n_documents"]
        sizes = tokens.shape[0], starts.shape[0], doc_bytes.shape[0]
        if (
            sizes != (entry["n_tokens"], n_documents + 1, n_documents)
            or starts[n_documents].read().result() != entry["n_tokens"]
        ):
            raise ValueError(f"{self.path / part.folder / name} does not have the documents of store.json")
        return tokens, _documents(starts, entry), doc_bytes

    def _check_part(self, part: "StorePart") -> None:
        """Raises ValueError if a part does not exist, or another one is in its place."""
        if part.crc32c is None:
            return
        folder = self.path / part.folder
        try:
            found = crc32c_of(json.loads((folder / "store.json").read_text()))
        except FileNotFoundError:
            raise ValueError(f"{folder} does not exist") from None
        except (ValueError, AttributeError):
            found = None
        if found != part.crc32c:
            raise ValueError(f"{folder} is damaged or is another part")

    def names(self, split: str) -> list[str]:
        """Returns the names of a split's documents, in their order, or their numbers if the store has no names. Raises
        UserError if the store is damaged."""
        names = []
        for part in self.parts:
            n_documents = part.splits[split]["n_documents"]
            if f"{split}/{NAMES}" not in part.arrays:
                names += map(str, range(len(names), len(names) + n_documents))
                continue
            with self._damage():
                found = bytes(self._open(part, f"{split}/{NAMES}").read().result()).decode().split("\n")[:-1]
                if len(found) != n_documents:
                    raise ValueError(
                        f"{self.path / part.folder / split / NAMES} does not have the documents of store.json"
                    )
            names += found
        return names

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"config.data.store={self.path}: is damaged ({str(error)[:300]}); prepare it again in another folder"
            ) from None

    @functools.cached_property
    def parts(self) -> list["StorePart"]:
        """The parts in their order; a store of one part counts as one."""
        if self.meta["format"] == FORMAT:
            return [StorePart("", self.fingerprint, self.meta["splits"], self.meta.get("arrays", {}))]
        return [StorePart(**part) for part in self.meta["parts"]]

    @property
    def n_parts(self) -> int:
        """The number of parts."""
        return len(self.parts)

    @property
    def versions(self) -> list[tuple[str, int]]:
        """The store's versions, one for each time that it was made or added to: fingerprint and number of parts."""
        before = [(fingerprint, n_parts) for fingerprint, n_parts in self.meta.get("before", [])]
        return [*before, (self.fingerprint, len(self.parts))]

    def as_of(self, fingerprint: str) -> "TokenStore | None":
        """Returns the store as it was when it had this fingerprint, before more was added; None if it never had it."""
        n_parts = dict(self.versions).get(fingerprint)
        if n_parts is None or fingerprint == self.fingerprint:
            return self if n_parts else None
        earlier = copy.copy(self)
        earlier.__dict__.pop("parts", None)
        parts = self.meta["parts"][:n_parts]
        before = [version for version in self.meta["before"] if version[1] < n_parts]
        earlier.meta = self.meta | dict(parts=parts, before=before, fingerprint=fingerprint, splits=totals(parts))
        earlier.fingerprint, earlier._splits = fingerprint, {}
        return earlier

    def _open(self, part: "StorePart", name: str) -> tensorstore.TensorStore:
        folder = self.path / part.folder
        known = part.arrays.get(name)  # None: made by an older version
        if known is not None and google_crc32c.value(array_metadata(folder, name)) != known:
            raise ValueError(f"{folder / name / 'zarr.json'} has changed (CRC-32C)")
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(folder / name),
            "fill_missing_data_reads": False,
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        return tensorstore.open(spec, read=True, context=self._context).result()


@dataclasses.dataclass(frozen=True)
class StorePart:
    """A part of a store, as in store.json. folder: its path below the store's. splits, arrays: as in the part's
    store.json. crc32c: that file's; None: that file is the store's own, and folder is ""."""

    folder: str
    fingerprint: str
    splits: dict
    arrays: dict
    crc32c: int | None = None


def totals(parts: list[dict]) -> dict:
    """Returns the total sizes of each split of several parts. parts: as in store.json."""
    names = ("n_documents", "n_tokens", "n_bytes", "n_words")
    return {
        split: {name: sum(part["splits"][split].get(name, 0) for part in parts) for name in names} for split in SPLITS
    }


def _documents(starts: tensorstore.TensorStore, entry: dict) -> DocumentStarts:
    """Returns the starts of a split's documents. entry: the split's in store.json. Stores of older versions don't
    record where groups begin."""
    groups = entry.get("groups")
    if groups is None:
        return DocumentStarts.of(in_memory(starts))
    documents = group_bounds(entry["n_documents"], groups["n_documents"])
    return DocumentStarts(starts, documents, np.array([*groups["starts"], entry["n_tokens"]], np.int64))


def store_path(settings: Settings, workdir: epath.Path) -> epath.Path:
    """Returns the path of the run's token store."""
    return epath.Path(settings.data.store) if settings.data.store else workdir / "store"
