"""Opening the token store of a run, which is made first if it does not exist, and refused if it does not fit."""

import os
from collections.abc import Iterator

from etils import epath

from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.settings import DataSettings, Settings
from tvq_pod.data.beam import Beam
from tvq_pod.data.build import make_store
from tvq_pod.data.build_parts import make_parts
from tvq_pod.data.corpora import documents, documents_of, files_of
from tvq_pod.data.cut import check_unchanged, cut, signature
from tvq_pod.data.document import Document
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.papers import pg19_words
from tvq_pod.data.place import check_free, only_one
from tvq_pod.data.store import SPLITS, TokenStore, same_settings, store_path
from tvq_pod.data.text import BLOCK_BYTES
from tvq_pod.data.train_vocab import TRAINED, vocab_for
from tvq_pod.data.vocab import ByteVocab, Vocab, kept_vocab, load_vocab
from tvq_pod.data.walk import Rules, place_of
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.parallel.processes import on_process_zero


def check_source(settings: Settings, workdir: epath.Path) -> None:
    """Raises UserError if a store can't be made: no corpus, no text in it, or no place for it. Writes nothing."""
    if settings.data.mixture:
        return
    path = store_path(settings, workdir)
    check_free(path)
    is_trained = settings.data.vocab == TRAINED
    n_vocab = settings.data.vocab_size if is_trained else load_vocab(settings.data.vocab).n_vocab
    check_vocab_fits(settings, n_vocab)
    _check_text(settings.data)
    check_outside(settings, workdir)


def check_outside(settings: Settings, workdir: epath.Path) -> None:
    """Raises UserError if the corpus contains the run's own folder or store."""
    path, found = store_path(settings, workdir), files_of(settings.data)
    for walked in found.walks if found else ():
        for name, folder in ((f"the token store {path}", path), (f"--workdir={workdir}", workdir)):
            if place_of(os.fspath(folder), walked, Rules(settings.data)) is not None:
                raise UserError(
                    f"config.data.source={settings.data.source}: contains {name}, which would be read as text; "
                    "give another --workdir or config.data.store, or leave it out with config.data.exclude"
                )


def _check_text(data: DataSettings) -> None:
    n_bad, why = 0, ""
    for document in documents(data):
        if bytes(document.text[:BLOCK_BYTES]).strip() or len(document.text) > BLOCK_BYTES:
            return
        if document.problem:
            n_bad, why = n_bad + 1, document.problem
    bad = f"; {n_bad:,} files or rows left out, the last one: {why}" if n_bad else ""
    raise UserError(f"config.data.source={data.source}: is empty; give a corpus with text in it{bad}")


def tell_files(data: DataSettings) -> None:
    """Prints which files are read, and which are left out and why."""
    if found := files_of(data):
        for line in found.lines():
            say(line)


def open_store(
    settings: Settings, workdir: epath.Path, may_make: bool = True, beam: Beam | None = None
) -> TokenStore | Mixture:
    """Opens the run's token store, which is made first if it does not exist and may_make is set, or its mixture.

    beam: the workers that make it, if it has several parts; None: processes of this machine.
    Raises UserError if the store was made with other settings, or its vocabulary is larger than the model's.
    """
    data, path = settings.data, store_path(settings, workdir)
    if data.mixture:
        store = Mixture.open(data.mixture, data.mixture_schedule)
    elif TokenStore.exists(path):
        store = TokenStore(path)
        _check_same_corpus(data, store)
    elif not may_make:
        raise UserError(
            f"config.data.store={path}: does not exist on this host; give a folder that every process can reach"
        )
    else:
        check_source(settings, workdir)
        with only_one(path):
            if not TokenStore.exists(path):
                say(f"preparing {path} from {data.source}")
                tell_files(data)
                vocab = vocab_for(settings, workdir)
                _make(path, vocab, data, beam)
        store = TokenStore(path)
        _check_same_corpus(data, store)  # another process may have made it
    check_vocab_fits(settings, store.n_vocab)
    return store


def _make(path: epath.Path, vocab: Vocab, data: DataSettings, beam: Beam | None) -> None:
    """Writes the store, in one part or several, which depends on the corpus alone."""
    found = files_of(data)
    parts = cut(found) if found else []
    if beam and len(parts) < 2:
        say(f"  --runner={beam.runner}: {data.source} is one part, and this process writes it")
    if found is None:
        make_store(path, lambda: documents(data), vocab, data)
    elif len(parts) > 1:
        make_parts(path, parts, found, vocab, data, beam)
    else:
        files = signature(found.files)

        def corpus() -> Iterator[Document]:
            yield from documents_of(found, data)
            check_unchanged(found, files)

        make_store(path, corpus, vocab, data, files, holdout=found.holdout)


def open_on_all(settings: Settings, workdir: epath.Path) -> TokenStore | Mixture:
    """Opens the store on all processes of a job: process 0 makes it if necessary, while the others wait."""
    on_process_zero(lambda: open_store(settings, workdir))
    return open_store(settings, workdir, may_make=False)


def describe(store: TokenStore | Mixture) -> None:
    """Says what is in a store."""
    say(
        f"store {store.path}: vocabulary {store.vocab_name} ({store.n_vocab:,} ids), "
        f"fingerprint {store.fingerprint[:16]}"
    )
    for split in SPLITS:
        entry = store.meta["splits"][split]
        say(
            f"  {split:<10} {entry['n_documents']:>9,} documents {entry['n_tokens']:>14,} tokens "
            f"{entry['n_bytes']:>14,} bytes"
        )
    if (n_parts := store.n_parts) > 1:
        say(f"  in {n_parts} parts")


def words_of(store: TokenStore | Mixture, split: str) -> int:
    """Returns the number of words of a split, for word-level perplexity, as the authors of PG-19 counted them; 0 for
    other corpora."""
    entry = store.meta["splits"][split]
    if not store.meta.get("counts_words") or not entry.get("n_words"):
        return 0
    return pg19_words(split, entry["n_documents"], entry["n_words"])


def _check_same_corpus(data: DataSettings, store: TokenStore) -> None:
    there = {name: store.meta[name] for name in ("source", "validation_share", "test_share") if name in store.meta}
    if any(_differing(data, store, made) is None for made in store.meta.get("added", [])):
        return
    check_made_with(data, store, same_settings(there | store.meta["made_with"]))


def check_made_with(data: DataSettings, store: TokenStore, made: dict) -> None:
    """Raises UserError for the first setting that differs from what a store was made with."""
    if differs := _differing(data, store, made):
        name, value = differs
        raise UserError(
            f"config.data.{name}={getattr(data, name)}: the store {store.path} was prepared with {value}; "
            "give that, or another config.data.store"
        )


def _differing(data: DataSettings, store: TokenStore, made: dict) -> tuple[str, object] | None:
    """Returns the first setting that differs from what a store was made with, and its old value; None if none does."""
    for name, value in (dict(vocab=store.vocab_name) | made).items():
        given = _vocab_name(data, store) if name == "vocab" else getattr(data, name)
        if given != value:
            return name, value
    return None


def _vocab_name(data: DataSettings, store: TokenStore) -> str:
    """Returns the name of the vocabulary that the settings give. If its file is gone, or was trained here, that is the
    store's own copy."""
    of_pieces = store.vocab_name.startswith("sentencepiece:")
    if data.vocab == TRAINED:
        return store.vocab_name if of_pieces and store.n_vocab == data.vocab_size else f"{TRAINED}:{data.vocab_size}"
    is_gone = ByteVocab.name not in (data.vocab, store.vocab_name) and not os.path.exists(data.vocab)
    return store.vocab_name if is_gone else load_vocab(data.vocab).name


def run_vocab(settings: Settings, workdir: epath.Path) -> Vocab:
    """Returns the run's vocabulary: its own copy of the file, if it has one."""
    own = kept_vocab(workdir)
    return own if own.file_name or settings.data.vocab == ByteVocab.name else load_vocab(settings.data.vocab)
