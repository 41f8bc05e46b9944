"""--mode=prepare: a corpus becomes a token store. Training does the same when its store is not there.

--mode=train_vocab: only trains the SentencePiece model, where config.data.vocab=sentencepiece; prepare does the same
when there is none.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator

import google_crc32c
import tqdm
from etils import epath

from tvq_pod.config import DataSettings, Settings, check_vocab_fits
from tvq_pod.data.corpora import Document, Documents, documents
from tvq_pod.data.encode import encoded
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.papers import pg19_words
from tvq_pod.data.store import SPLITS, TokenStore, split_of
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.data.vocab import ByteVocab, SentencePieceVocab, Vocab, decoded, load_vocab
from tvq_pod.data.writer import StoreWriter, adopted, check_free, only_one
from tvq_pod.errors import UserError
from tvq_pod.parallel.deadlines import still_working
from tvq_pod.parallel.processes import is_first, on_first
from tvq_pod.paths import is_bucket, write_whole
from tvq_pod.progress import say

# What documents depend on, besides the vocabulary
MADE_WITH = ("source", "format", "text_field", "glob", "invalid_utf8", "validation_share", "test_share")
TRAINED = "sentencepiece"  # the vocabulary that is made here
BLOCK_BYTES = 2**20  # of a document that are looked at at a time: it may be a file of any size
PROBES, PROBE_BYTES = 3, 2**14  # documents, and how much of each, that must come back from their tokens
SHOWN = 3  # names of odd documents that a message lists


def store_path(settings: Settings, workdir: epath.Path) -> epath.Path:
    """Where the run's token store is."""
    return epath.Path(settings.data.store) if settings.data.store else workdir / "store"


def prepare(settings: Settings, workdir: epath.Path) -> None:
    """Makes the token store, or says that it is there."""
    path = store_path(settings, workdir)
    if TokenStore.exists(path):
        say(f"{path} is there already")
    on_first(lambda: describe(open_store(settings, workdir)))


def train_vocab(settings: Settings, workdir: epath.Path) -> None:
    """Trains the vocabulary, or says that it is there. Raises UserError if the config has another one."""
    if settings.data.vocab != TRAINED:
        raise UserError(f"config.data.vocab={settings.data.vocab}: must be {TRAINED} for --mode=train_vocab")
    path = trained_path(settings, workdir)
    if path.exists():
        say(f"{path} is there already")
    else:
        check_source(settings, workdir)
    with only_one(store_path(settings, workdir)):
        _vocab(settings, workdir)


def trained_path(settings: Settings, workdir: epath.Path) -> epath.Path:
    """Where the model of config.data.vocab=sentencepiece is: beside the store."""
    store = store_path(settings, workdir)
    return store.with_name(f"{store.name}.vocab.model")


def check_source(settings: Settings, workdir: epath.Path) -> None:
    """Raises UserError if a store can't be made: no corpus, no text in it, no place for it. Writes nothing."""
    if settings.data.mixture:
        return
    path = store_path(settings, workdir)
    source = settings.data.source
    check_free(path)
    is_trained = settings.data.vocab == TRAINED
    n_vocab = settings.data.vocab_size if is_trained else load_vocab(settings.data.vocab).n_vocab
    check_vocab_fits(settings, n_vocab)
    if not any(len(document.text) for document in documents(settings.data)):
        raise UserError(f"config.data.source={source}: is empty; give a corpus with text in it")
    if os.path.isdir(source) and not is_bucket(path) and _is_below(os.path.realpath(path), os.path.realpath(source)):
        raise UserError(
            f"config.data.source={source}: holds the token store {path}, which would be read as text; "
            "give another --workdir or config.data.store"
        )


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def open_store(settings: Settings, workdir: epath.Path, may_make: bool = True) -> TokenStore | Mixture:
    """The run's token store, made first if it is not there and may_make; or its mixture of stores.

    Raises UserError if it was made from something else than the settings say, or has more tokens than the model knows.
    """
    data, path = settings.data, store_path(settings, workdir)
    if data.mixture:
        store = Mixture.open(data.mixture)
    elif TokenStore.exists(path):
        store = TokenStore(path)
        _check_same_corpus(data, store)
    elif not may_make:
        raise UserError(f"config.data.store={path}: is not seen on this host; every process must reach the same folder")
    else:
        check_source(settings, workdir)
        with only_one(path):
            if not TokenStore.exists(path):
                vocab = _vocab(settings, workdir)
                say(f"preparing {path} from {data.source}")
                make_store(path, lambda: documents(data), vocab, data)
        store = TokenStore(path)
        _check_same_corpus(data, store)  # it may be another process that made it
    check_vocab_fits(settings, store.n_vocab)
    return store


def make_store(path: epath.PathLike, corpus, vocab: Vocab, data: DataSettings) -> TokenStore:
    """Writes a store of the documents that corpus() gives; goes on where another process was broken off.

    Raises UserError if there is something else at `path`, or no document is left to train on.
    """
    made_with = {name: getattr(data, name) for name in MADE_WITH}
    counts_words = data.format == "pg19"
    if store := adopted(path, vocab, made_with):
        return store
    with StoreWriter(path, vocab, made_with) as writer:
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
                split.end(len(taken.text), n_words)
                writer.may_commit(taken.number, taken.crc)
        left.report()
        return writer.finish(counts_words=counts_words)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A document that goes into the store. number, crc: of all the corpus' documents up to it, how many, and a CRC-32C
    of their names and texts."""

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
        self._empty, self._odd = _Names(), _Names()
        self._probes = 0 if vocab.takes_any_bytes else PROBES
        self._bar = tqdm.tqdm(
            unit="B", unit_scale=True, file=sys.stderr, disable=not is_first(), delay=1,
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
        head = f"{document.name}\0{document.split}\0{len(document.text)}\0"
        self._crc = google_crc32c.extend(self._crc, head.encode("utf-8", errors="surrogateescape"))
        for begin in range(0, len(document.text), BLOCK_BYTES):
            self._crc = google_crc32c.extend(self._crc, bytes(document.text[begin : begin + BLOCK_BYTES]))

    def __iter__(self) -> Iterator[tuple[_Taken, bytes | memoryview]]:
        for document in self._corpus:
            self._count(document)
            self._bar.update(len(document.text))
            if not len(document.text):
                self._empty.add(document.name)
                continue
            text, is_odd = _usable(document, self._vocab.takes_any_bytes, self._data.invalid_utf8)
            if is_odd:
                self._odd.add(document.name)
            if text is None:
                continue
            if self._probes:
                self._probes -= 1
                self._probe(document.name, bytes(text[:PROBE_BYTES]))
            split = document.split or split_of(text, self._data.validation_share, self._data.test_share)
            yield _Taken(text, split, self._number, self._crc), text

    def _probe(self, name: str, text: bytes) -> None:
        """Warns of a vocabulary that changes text: bits per byte are of the text as it was."""
        text = text.decode("utf-8", errors="ignore")
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
        if self._empty.count:
            say(f"  {self._empty.count} empty documents left out: {self._empty}")
        if self._odd.count:
            done = {"replace": "their odd bytes became U+FFFD", "skip": "they were left out"}
            done = done.get(self._data.invalid_utf8, "")
            done = "a byte model takes their bytes as they are" if self._vocab.takes_any_bytes else done
            say(f"  {self._odd.count} documents are not UTF-8, {done}: {self._odd}")


class _Names:
    """How many names there were, and the first of them."""

    def __init__(self):
        self.count, self._first = 0, []

    def add(self, name: str) -> None:
        self.count += 1
        self._first += [name] * (self.count <= SHOWN)

    def __str__(self) -> str:
        return ", ".join(self._first) + (", ..." if self.count > SHOWN else "")


def _usable(document: Document, any_bytes: bool, invalid_utf8: str) -> tuple[bytes | memoryview | None, bool]:
    """The text of a document as it is encoded, or None to leave it out; and whether it is not UTF-8."""
    place = _not_utf8(document.text)
    if place is None or any_bytes:
        return document.text, place is not None
    if invalid_utf8 == "error":
        raise UserError(
            f"config.data.invalid_utf8=error: {document.name} is not UTF-8 at byte {place}, and this "
            "vocabulary needs text; mend the file, or give replace or skip"
        )
    if invalid_utf8 == "skip":
        return None, True
    return bytes(document.text).decode("utf-8", errors="replace").encode("utf-8"), True


def _not_utf8(text: bytes | memoryview) -> int | None:
    """Where a text is not UTF-8; None if it is."""
    at = 0
    while at < len(text):
        part = bytes(text[at : at + BLOCK_BYTES])
        try:
            part.decode("utf-8")
        except UnicodeDecodeError as error:
            is_cut = error.reason == "unexpected end of data" and error.start > 0
            if not is_cut:
                return at + error.start
            part = part[: error.start]  # in the middle of a character
        at += len(part)
    return None


def _vocab(settings: Settings, workdir: epath.Path) -> Vocab:
    """The vocabulary; that of config.data.vocab=sentencepiece is trained, if it is not there."""
    data = settings.data
    if data.vocab != TRAINED:
        return load_vocab(data.vocab)
    path = trained_path(settings, workdir)
    beside = path.with_name(f"{path.name}.json")
    made_with = {name: getattr(data, name) for name in (*MADE_WITH, "vocab_size")}
    if not path.exists() and is_first():
        check_vocab_fits(settings, data.vocab_size)
        say(f"training {path}: {data.vocab_size:,} pieces, from the training documents of {data.source}")
        model = train_sentencepiece(_training_texts(data), data.vocab_size)
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(beside, json.dumps(made_with))
            draft = path.with_name(f"{path.name}.writing")
            draft.write_bytes(model)
            draft.replace(path)
    try:
        there = json.loads(beside.read_text())
    except (OSError, ValueError):
        there = {}
    for name, value in made_with.items():
        if there.get(name) != value:
            raise UserError(
                f"config.data.{name}={value}: the vocabulary {path} was trained with {there.get(name)}; give that, or "
                "another config.data.store, or remove the file"
            )
    return SentencePieceVocab(path)


def _training_texts(data: DataSettings) -> Iterator[bytes | memoryview]:
    for document in documents(data):
        still_working()
        text, _ = _usable(document, any_bytes=False, invalid_utf8=data.invalid_utf8)
        if text is not None and len(text):
            split = document.split or split_of(text, data.validation_share, data.test_share)
            if split == "train":
                yield text


@contextlib.contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"config.data.store: {path} can't be written ({error.strerror or error})") from None


def describe(store: TokenStore | Mixture) -> None:
    """Says what is in a store."""
    say(f"store {store.path}: vocabulary {store.vocab_name} of {store.n_vocab}, fingerprint {store.fingerprint[:16]}")
    for split in SPLITS:
        entry = store.meta["splits"][split]
        say(
            f"  {split:<10} {entry['n_documents']:>9,} documents {entry['n_tokens']:>14,} tokens "
            f"{entry['n_bytes']:>14,} bytes"
        )


def words_of(store: TokenStore | Mixture, split: str) -> int:
    """Words of a split, for word-level perplexity: what the authors of PG-19 counted; 0 for other corpora."""
    entry = store.meta["splits"][split]
    if not store.meta.get("counts_words") or not entry.get("n_words"):
        return 0
    return pg19_words(split, entry["n_documents"], entry["n_words"])


def _check_same_corpus(data: DataSettings, store: TokenStore) -> None:
    there = {name: store.meta[name] for name in ("source", "validation_share", "test_share") if name in store.meta}
    there |= store.meta["made_with"]
    for name, value in (dict(vocab=store.vocab_name) | there).items():
        given = _vocab_name(data, store) if name == "vocab" else getattr(data, name)
        if given != value:
            raise UserError(
                f"config.data.{name}={getattr(data, name)}: the store {store.path} was prepared with {value}; "
                "give that, or another config.data.store"
            )


def _vocab_name(data: DataSettings, store: TokenStore) -> str:
    """Of the vocabulary that the settings say. Where its file is gone, or was made here, the store's own copy is what
    it was."""
    of_pieces = store.vocab_name.startswith("sentencepiece:")
    if data.vocab == TRAINED:
        return store.vocab_name if of_pieces and store.n_vocab == data.vocab_size else f"{TRAINED}:{data.vocab_size}"
    is_gone = ByteVocab.name not in (data.vocab, store.vocab_name) and not os.path.exists(data.vocab)
    return store.vocab_name if is_gone else load_vocab(data.vocab).name
