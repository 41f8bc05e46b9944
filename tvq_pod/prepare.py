"""--mode=prepare: a corpus becomes a token store. Training does the same when its store is not there.

--mode=train_vocab: only trains the SentencePiece model, where config.data.vocab=sentencepiece; prepare does the same
when there is none.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator

import google_crc32c
import tqdm
from etils import epath

from tvq_pod.config import DataSettings, Settings, check_vocab_fits
from tvq_pod.data.corpora import Document, Documents, documents, guess_format
from tvq_pod.data.encode import encoded
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.papers import pg19_words
from tvq_pod.data.store import SPLITS, TokenStore, split_of
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.data.vocab import ByteVocab, SentencePieceVocab, Vocab, load_vocab
from tvq_pod.data.writer import StoreWriter, check_free, only_one
from tvq_pod.errors import UserError
from tvq_pod.parallel.processes import is_first, on_first
from tvq_pod.progress import say

# What documents depend on, besides the vocabulary
MADE_WITH = ("source", "format", "text_field", "glob", "invalid_utf8", "validation_share", "test_share")
TRAINED = "sentencepiece"  # the vocabulary that is made here
BLOCK_BYTES = 2**20  # of a document that are looked at at a time: it may be a file of any size
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
    _vocab(settings, workdir)


def trained_path(settings: Settings, workdir: epath.Path) -> epath.Path:
    """Where the model of config.data.vocab=sentencepiece is: beside the store."""
    store = store_path(settings, workdir)
    return store.with_name(f"{store.name}.vocab.model")


def check_source(settings: Settings, workdir: epath.Path) -> None:
    """Raises UserError if a store can't be made: no corpus, no text in it, no place for it. Writes nothing."""
    path = store_path(settings, workdir)
    source = settings.data.source
    if settings.data.mixture:
        return
    check_free(path)
    is_trained = settings.data.vocab == TRAINED
    n_vocab = settings.data.vocab_size if is_trained else load_vocab(settings.data.vocab).n_vocab
    check_vocab_fits(settings, n_vocab)
    if not any(len(document.text) for document in documents(settings.data)):
        raise UserError(f"config.data.source={source}: is empty; give a corpus with text in it")
    if os.path.isdir(source) and os.path.abspath(path).startswith(f"{os.path.abspath(source)}/"):
        raise UserError(
            f"config.data.source={source}: holds the token store {path}, which would be read as text; "
            "give another --workdir or config.data.store"
        )


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
    check_vocab_fits(settings, store.n_vocab)
    return store


def make_store(path: epath.PathLike, corpus, vocab: Vocab, data: DataSettings) -> TokenStore:
    """Writes a store of the documents that corpus() gives; goes on where another process was broken off.

    Raises UserError if there is something else at `path`, or no document is left to train on.
    """
    made_with = {name: getattr(data, name) for name in MADE_WITH}
    counts_words = data.source and not data.mixture and _format(data) == "pg19"
    with StoreWriter(path, vocab, made_with) as writer:
        left = _Left(corpus(), vocab, data)
        if not left.pass_over(writer.n_taken, writer.crc_taken):
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
        return writer.finish(counts_words=bool(counts_words))


def _format(data: DataSettings) -> str:
    return data.format if data.format != "auto" else guess_format(data)


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
        self._empty, self._odd = [], []
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
        if n_taken:
            say(f"  goes on after {n_taken:,} documents")
        return self._crc == crc_taken

    def _count(self, document: Document) -> None:
        self._number += 1
        self._crc = google_crc32c.extend(self._crc, document.name.encode("utf-8", errors="surrogateescape"))
        for begin in range(0, len(document.text), BLOCK_BYTES):
            self._crc = google_crc32c.extend(self._crc, bytes(document.text[begin : begin + BLOCK_BYTES]))

    def __iter__(self) -> Iterator[tuple[_Taken, bytes | memoryview]]:
        data, any_bytes = self._data, self._vocab.takes_any_bytes
        for document in self._corpus:
            self._count(document)
            self._bar.update(len(document.text))
            text = document.text
            if not len(text):
                self._empty.append(document.name)
                continue
            if (place := _not_utf8(text)) is not None:
                if not any_bytes and data.invalid_utf8 == "error":
                    raise UserError(
                        f"config.data.invalid_utf8=error: {document.name} is not UTF-8 at byte {place}, and this "
                        "vocabulary needs text; mend the file, or give replace or skip"
                    )
                self._odd.append(document.name)
                if not any_bytes and data.invalid_utf8 == "skip":
                    continue
                if not any_bytes:
                    text = bytes(text).decode("utf-8", errors="replace").encode("utf-8")
            split = document.split or split_of(text, data.validation_share, data.test_share)
            yield _Taken(text, split, self._number, self._crc), text

    def report(self) -> None:
        """Says what was odd."""
        self._bar.close()
        if self._empty:
            say(f"  {len(self._empty)} empty documents left out: {_some(self._empty)}")
        if self._odd:
            done = {"replace": "their odd bytes became U+FFFD", "skip": "they were left out"}
            done = done.get(self._data.invalid_utf8, "")
            done = "a byte model takes their bytes as they are" if self._vocab.takes_any_bytes else done
            say(f"  {len(self._odd)} documents are not UTF-8, {done}: {_some(self._odd)}")


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
    if not path.exists() and is_first():
        check_vocab_fits(settings, data.vocab_size)
        say(f"training {path}: {data.vocab_size:,} pieces, from the training documents of {data.source}")
        texts = (
            document.text
            for document in documents(data)
            if (document.split or split_of(document.text, data.validation_share, data.test_share)) == "train"
        )
        model = train_sentencepiece(texts, data.vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.writing")
        draft.write_bytes(model)
        draft.rename(path)
    vocab = SentencePieceVocab(path)
    if vocab.n_vocab != data.vocab_size:
        raise UserError(f"config.data.vocab_size={data.vocab_size}: {path} has {vocab.n_vocab} pieces; give that")
    return vocab


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


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


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
