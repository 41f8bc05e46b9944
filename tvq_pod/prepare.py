"""--mode=prepare: a corpus becomes a token store. Training does the same when its store is not there."""

import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from tvq_pod.config import DataSettings, Settings, check_vocab_fits
from tvq_pod.data.corpora import Documents, documents
from tvq_pod.data.store import SPLITS, TokenStore, check_free, write_store
from tvq_pod.data.vocab import ByteVocab, SentencePieceVocab, load_vocab
from tvq_pod.errors import UserError
from tvq_pod.parallel.processes import on_first
from tvq_pod.progress import say

MADE_WITH = ("format", "text_field", "glob", "invalid_utf8")  # what documents depend on besides source and vocab
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


def check_source(settings: Settings, workdir: epath.Path) -> None:
    """Raises UserError if a store can't be made: no corpus, no text in it, no place for it. Writes nothing."""
    path = store_path(settings, workdir)
    source = settings.data.source
    check_free(path)
    vocab = load_vocab(settings.data.vocab)
    check_vocab_fits(settings, vocab.n_vocab)
    if not any(text for _, text in documents(settings.data)):
        raise UserError(f"config.data.source={source}: is empty; give a corpus with text in it")
    if os.path.isdir(source) and os.path.abspath(path).startswith(f"{os.path.abspath(source)}/"):
        raise UserError(
            f"config.data.source={source}: holds the token store {path}, which would be read as text; "
            "give another --workdir or config.data.store"
        )


def open_store(settings: Settings, workdir: epath.Path, may_make: bool = True) -> TokenStore:
    """The run's token store, made first if it is not there and may_make.

    Raises UserError if it was made from something else than the settings say, or has more tokens than the model knows.
    """
    data, path = settings.data, store_path(settings, workdir)
    if TokenStore.exists(path):
        store = TokenStore(path)
        _check_same_corpus(data, store)
    elif not may_make:
        raise UserError(f"config.data.store={path}: is not seen on this host; every process must reach the same folder")
    else:
        check_source(settings, workdir)
        vocab = load_vocab(data.vocab)
        say(f"preparing {path} from {data.source}")
        store = write_store(
            path,
            tokenized(documents(data), vocab, data),
            vocab,
            validation_share=data.validation_share,
            test_share=data.test_share,
            source=data.source,
            made_with={name: getattr(data, name) for name in MADE_WITH},
        )
    check_vocab_fits(settings, store.n_vocab)
    return store


def tokenized(
    docs: Documents, vocab: ByteVocab | SentencePieceVocab, data: DataSettings
) -> Iterator[tuple[bytes, np.ndarray]]:
    """(text, token ids) of each document; says at the end what it did about documents that are empty or not UTF-8."""
    empty, odd = [], []
    for name, text in docs:
        if not text:
            empty.append(name)
            continue
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            if not vocab.takes_any_bytes:
                if data.invalid_utf8 == "error":
                    raise UserError(
                        f"config.data.invalid_utf8=error: {name} is not UTF-8 at byte {error.start}, and a "
                        "SentencePiece model needs text; mend the file, or give replace or skip"
                    ) from None
                if data.invalid_utf8 == "replace":
                    text = text.decode("utf-8", errors="replace").encode("utf-8")
            odd.append(name)
            if not vocab.takes_any_bytes and data.invalid_utf8 == "skip":
                continue
        yield text, vocab.encode(text)
    if empty:
        say(f"  {len(empty)} empty documents left out: {_some(empty)}")
    if odd:
        done = {"replace": "their odd bytes became U+FFFD", "skip": "they were left out"}.get(data.invalid_utf8, "")
        done = "a byte model takes their bytes as they are" if vocab.takes_any_bytes else done
        say(f"  {len(odd)} documents are not UTF-8, {done}: {_some(odd)}")


def describe(store: TokenStore) -> None:
    """Says what is in a store."""
    say(f"store {store.path}: vocabulary {store.vocab_name} of {store.n_vocab}, fingerprint {store.fingerprint[:16]}")
    for split in SPLITS:
        entry = store.meta["splits"][split]
        say(
            f"  {split:<10} {entry['n_documents']:>9,} documents {entry['n_tokens']:>14,} tokens "
            f"{entry['n_bytes']:>14,} bytes"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _check_same_corpus(data: DataSettings, store: TokenStore) -> None:
    vocab = data.vocab
    # Where the file of a SentencePiece model is gone, the store's own copy is what it was.
    is_gone = ByteVocab.name not in (vocab, store.vocab_name) and not os.path.exists(vocab)
    vocab = store.vocab_name if is_gone else load_vocab(vocab).name
    there = {name: store.meta[name] for name in ("vocab", "source", "validation_share", "test_share")}
    there |= store.meta["made_with"]
    for name, value in there.items():
        if (vocab if name == "vocab" else getattr(data, name)) != value:
            raise UserError(
                f"config.data.{name}={getattr(data, name)}: the store {store.path} was prepared with {value}; "
                "give that, or another config.data.store"
            )
