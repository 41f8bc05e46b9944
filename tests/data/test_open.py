"""The store of a run: opened, made first, or refused; and the vocabulary that is trained for it."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tokenizers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from tests.common import store_of
from tests.data.texts import TEXTS, settings_for
from tvq_pod.config.settings import DataSettings
from tvq_pod.data import store as store_module
from tvq_pod.data import text as text_module
from tvq_pod.data import train_vocab as train_vocab_module
from tvq_pod.data.checked import Checked
from tvq_pod.data.document import Document
from tvq_pod.data.open import open_store, words_of
from tvq_pod.data.store import SPLITS
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.data.vocab import ByteVocab, HuggingFaceVocab, SentencePieceVocab, decoded
from tvq_pod.errors import UserError
from tvq_pod.modes.prepare import train_vocab


def test_a_vocabulary_is_trained_where_there_is_none_and_kept_beside_the_store(corpus, tmp_path, capsys):
    settings = settings_for(corpus, vocab="sentencepiece", vocab_size=300)
    train_vocab(settings, epath.Path(tmp_path / "run"))
    names = ["store.vocab.model", "store.vocab.model.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    train_vocab(settings, epath.Path(tmp_path / "run"))
    assert "store.vocab.model exists already" in capsys.readouterr().err
    store = open_store(settings, epath.Path(tmp_path / "run"))
    assert store.vocab().name == SentencePieceVocab(tmp_path / "run/store.vocab.model").name
    at_once = open_store(settings, epath.Path(tmp_path / "other"))
    assert at_once.fingerprint == store.fingerprint
    tokens, starts = store.split("train").tokens.read().result(), store.split("train").starts
    found = {decoded(tokens[begin:end], store.vocab()) for begin, end in itertools.pairwise(starts)}
    assert found < set(TEXTS)
    with pytest.raises(UserError, match=r"config.data.vocab=sentencepiece: the store .* was prepared with sentencepi"):
        open_store(settings_for(corpus, vocab="sentencepiece", vocab_size=310), epath.Path(tmp_path / "run"))
    with pytest.raises(UserError, match=r"config.data.vocab=bytes: the store .* was prepared with sentencepiece:"):
        open_store(settings_for(corpus), epath.Path(tmp_path / "run"))
    with pytest.raises(UserError, match=r"config.data.vocab=bytes: must be sentencepiece for --mode=train_vocab"):
        train_vocab(settings_for(corpus), epath.Path(tmp_path / "run"))


def test_a_vocabulary_that_the_model_has_no_room_for_is_refused_before_it_is_trained(corpus, tmp_path):
    settings = settings_for(corpus, vocab="sentencepiece", vocab_size=500)
    with pytest.raises(UserError, match=r"config.model.n_vocab=400: must be at least 500"):
        train_vocab(settings, epath.Path(tmp_path / "run"))
    with pytest.raises(UserError, match=r"config.model.n_vocab=400: must be at least 500"):
        open_store(settings, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class TextOnlyVocab(ByteVocab):
    takes_any_bytes = False
    n_vocab = 300


@pytest.mark.parametrize("invalid_utf8", ["error", "replace", "skip"])
@pytest.mark.parametrize("block_bytes", [3, 2**20])
def test_documents_that_are_not_utf8(tmp_path, invalid_utf8, block_bytes, capsys, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    texts = ["fine: 漢字é".encode(), b"caf\xe9", b""]

    def texts_in(store):
        tokens, starts = store.split("train").tokens.read().result(), store.split("train").starts
        return [bytes((tokens[a : b - 1] - 3).astype(np.uint8)) for a, b in itertools.pairwise(starts)]

    # a byte model takes the bytes as they are, and says so
    assert texts_in(store_of(tmp_path / "bytes", texts, invalid_utf8=invalid_utf8)) == texts[:2]
    said = capsys.readouterr().err
    assert "keeps the bytes of 1 document that is not UTF-8: 1" in said
    assert "leaves out 1 empty document: 2" in said
    if invalid_utf8 == "error":
        with pytest.raises(UserError, match=r"config.data.invalid_utf8=error: 1 is not UTF-8 at byte 3"):
            store_of(tmp_path / "text", texts, TextOnlyVocab(), invalid_utf8=invalid_utf8)
    else:
        kept = texts_in(store_of(tmp_path / "text", texts, TextOnlyVocab(), invalid_utf8=invalid_utf8))
        assert kept == texts[:1] + (["caf\ufffd".encode()] if invalid_utf8 == "replace" else [])


@given(texts=st.lists(st.sampled_from([b"plain", "é漢".encode(), b"caf\xe9", b"\xe6", b"\xbc\xa2", b"\n", b""])))
def test_which_documents_of_a_batch_are_not_utf8_depends_on_each_alone(texts):
    """Neighbors that would be a character together are not, one by one."""
    data = DataSettings(source="made up", invalid_utf8="skip", validation_share=0.0, test_share=0.0)
    checked = Checked(iter([Document(str(n), text) for n, text in enumerate(texts)]), TextOnlyVocab(), data)
    kept = [text for batch in checked for text in batch.texts]
    odd = [text for text in texts if text.decode("utf-8", errors="replace").encode() != text]
    assert kept == [text for text in texts if text and text not in odd]
    assert (checked.report.odd.count, checked.report.empty.count) == (len(odd), texts.count(b""))


def test_a_vocabulary_of_another_corpus_is_not_used_in_silence(corpus, tmp_path):
    settings = settings_for(corpus, vocab="sentencepiece", vocab_size=300)
    train_vocab(settings, epath.Path(tmp_path / "run"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else/text").write_text("other")
    for name, value in (("source", str(tmp_path / "else")), ("validation_share", 0.3), ("glob", "**/*.txt")):
        other = dataclasses.replace(settings, data=dataclasses.replace(settings.data, **{name: value}))
        with pytest.raises(UserError, match=rf"config.data.{name}=.*: the vocabulary .* was trained with"):
            open_store(other, epath.Path(tmp_path / "run"))


def test_held_out_documents_train_no_vocabulary(tmp_path, monkeypatch):
    """Nor do they where their odd bytes are replaced, so that another text is hashed."""
    (tmp_path / "corpus").mkdir()
    for n in range(60):
        (tmp_path / f"corpus/{n}").write_bytes(f"document {n} ".encode() * 20 + b"\xff")
    settings = settings_for(tmp_path / "corpus", vocab="sentencepiece", vocab_size=300, invalid_utf8="replace")
    seen = []

    def train(texts, size):
        seen.extend(texts)
        return train_sentencepiece(seen, size)

    monkeypatch.setattr(train_vocab_module, "train_sentencepiece", train)
    store = open_store(settings, epath.Path(tmp_path / "run"))
    split = store.split("train")
    tokens = split.tokens.read().result()
    found = [decoded(tokens[a:b], store.vocab()).encode() for a, b in itertools.pairwise(split.starts)]
    assert sorted(seen) == sorted(found)
    assert 0 < len(found) < 60


def test_a_vocabulary_that_changes_text_is_warned_of(tmp_path, capsys):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    tokenizer.save(str(tmp_path / "lower.json"))
    store_of(tmp_path / "a", [b"all small", b"and One not"], HuggingFaceVocab(tmp_path / "lower.json"))
    said = capsys.readouterr().err
    assert "this vocabulary changes text: 'One not' of 1 comes back as 'one not'" in said


def test_an_error_while_a_vocabulary_is_trained_is_that_error(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"text": "fine"}\n' * 3 + "{\n")
    settings = settings_for(tmp_path / "docs.jsonl", vocab="sentencepiece", vocab_size=300)
    with pytest.raises(UserError, match=r"docs.jsonl: line 4 is not JSON"):
        train_vocab(settings, epath.Path(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*model*"))


def test_words_are_counted_for_pg19_only(corpus, tmp_path):
    books = tmp_path / "pg19"
    for split, names in (("train", "12"), ("validation", "3"), ("test", "4")):
        (books / split).mkdir(parents=True)
        for name in names:
            (books / split / f"{name}.txt").write_text(TEXTS[int(name)])
    (books / "metadata.csv").write_text("".join(f"{n},title,1900,http://\n" for n in (1, 2, 3, 4)))
    settings = settings_for(books, format="pg19")
    store = open_store(settings, epath.Path(tmp_path / "books"))
    assert [store.meta["splits"][split]["n_documents"] for split in SPLITS] == [2, 1, 1]
    assert words_of(store, "validation") == len(TEXTS[3].split())
    assert words_of(open_store(settings_for(corpus), epath.Path(tmp_path / "run")), "validation") == 0


def test_a_store_of_an_older_version_is_still_known(corpus, tmp_path):
    settings = settings_for(corpus)
    store = open_store(settings, epath.Path(tmp_path / "run"))
    meta = {name: value for name, value in store.meta.items() if name not in ("made_with", "counts_words", "crc32c")}
    top = ("source", "validation_share", "test_share")
    meta |= {name: store.meta["made_with"][name] for name in top}
    meta["made_with"] = {name: value for name, value in store.meta["made_with"].items() if name not in top}
    (store.path / "store.json").write_text(json.dumps(meta | dict(crc32c=store_module.crc32c_of(meta))))
    assert open_store(settings, epath.Path(tmp_path / "run")).fingerprint == store.fingerprint
    other = dataclasses.replace(settings, data=dataclasses.replace(settings.data, test_share=0.0))
    with pytest.raises(UserError, match=r"config.data.test_share=0.0: the store .* was prepared with 0.1"):
        open_store(other, epath.Path(tmp_path / "run"))


LATER = dict(exclude=("*.md", ""), hidden=(True, False), bad_rows=("skip", "error"), holdout=("position", "auto"))


def test_a_store_and_a_vocabulary_made_before_a_setting_was_there_fit_its_default_and_no_other_value(corpus, tmp_path):
    settings = settings_for(corpus, vocab="sentencepiece", vocab_size=300)
    store = open_store(settings, epath.Path(tmp_path / "run"))
    meta = {name: value for name, value in store.meta.items() if name != "crc32c"}
    meta["made_with"] = {name: value for name, value in meta["made_with"].items() if name not in LATER}
    (store.path / "store.json").write_text(json.dumps(meta | dict(crc32c=store_module.crc32c_of(meta))))
    beside = tmp_path / "run/store.vocab.model.json"
    old = {name: value for name, value in json.loads(beside.read_text()).items() if name not in LATER}
    beside.write_text(json.dumps(old))
    assert open_store(settings, epath.Path(tmp_path / "run")).fingerprint == store.fingerprint
    for name, (value, default) in LATER.items():
        other = dataclasses.replace(settings, data=dataclasses.replace(settings.data, **{name: value}))
        with pytest.raises(
            UserError, match=rf"config.data.{name}=.*: the store .* was prepared with {default}; give that"
        ):
            open_store(other, epath.Path(tmp_path / "run"))
    store.path.rename(tmp_path / "gone")
    assert open_store(settings, epath.Path(tmp_path / "run")).fingerprint == store.fingerprint  # with its vocabulary
