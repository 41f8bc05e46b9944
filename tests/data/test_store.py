"""The token store: what goes in comes out, damage is an error, and half a store is none."""

import json
import pathlib

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.common import store_of
from tvq_pod.data import store as store_module
from tvq_pod.data.store import SPLITS, TokenStore, split_of
from tvq_pod.data.vocab import END_OF_DOC, N_SPECIAL, ByteVocab, SentencePieceVocab
from tvq_pod.errors import UserError


def texts_of(store, split="train"):
    part = store.split(split)
    tokens = part.tokens.read().result()
    documents = [tokens[begin:end] for begin, end in zip(part.starts[:-1], part.starts[1:], strict=True)]
    assert all(document[-1] == END_OF_DOC for document in documents)
    assert list(part.doc_bytes) == [len(document) - 1 for document in documents]
    return [bytes((document[:-1] - N_SPECIAL).astype(np.uint8)) for document in documents]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=20))
def test_bytes_come_back_as_they_went_in(tmp_path_factory, texts):
    store = store_of(tmp_path_factory.mktemp("store") / "s", texts)
    assert texts_of(store) == texts
    assert store.meta["splits"]["train"]["n_bytes"] == sum(map(len, texts))


def test_an_array_may_span_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1024)
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 128)
    rng = np.random.default_rng(0)
    texts = [rng.bytes(int(n)) for n in rng.integers(1, 3000, size=20)]
    store = store_of(tmp_path / "s", texts)
    assert texts_of(store) == texts
    assert len(list((tmp_path / "s/train/tokens").rglob("*"))) > 10


def test_the_fingerprint_is_of_the_content(tmp_path):
    texts = [b"one", b"two", b"three"]
    first = store_of(tmp_path / "a", texts).fingerprint
    assert store_of(tmp_path / "b", texts).fingerprint == first
    assert TokenStore(tmp_path / "a").fingerprint == first
    assert store_of(tmp_path / "c", [b"one", b"two", b"threE"]).fingerprint != first
    assert store_of(tmp_path / "d", [b"onet", b"wo", b"three"]).fingerprint != first


def test_splits_are_drawn_by_content(tmp_path):
    texts = [str(i).encode() for i in range(400)]
    store = store_of(tmp_path / "a", texts, validation_share=0.2, test_share=0.1)
    split = {text: name for name in SPLITS for text in texts_of(store, name)}
    assert len(split) == 400
    assert 50 < sum(name == "validation" for name in split.values()) < 110
    assert 20 < sum(name == "test" for name in split.values()) < 60
    assert all(split_of(text, 0.2, 0.1) == name for text, name in split.items())
    # more documents, or another order, move none
    more = store_of(tmp_path / "b", [b"new", *reversed(texts)], validation_share=0.2, test_share=0.1)
    assert {text: name for name in SPLITS for text in texts_of(more, name) if text != b"new"} == split


def _shards(path) -> list[pathlib.Path]:
    return [file for file in (path / "train/tokens").rglob("*") if file.is_file() and file.name != "zarr.json"]


def test_a_flipped_byte_is_an_error_when_it_is_read(tmp_path):
    store_of(tmp_path / "s", [np.random.default_rng(0).bytes(5000)])
    (shard,) = _shards(tmp_path / "s")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?i)crc|checksum|digest"):
        TokenStore(tmp_path / "s").split("train").tokens.read().result()


def test_a_missing_file_is_an_error_when_it_is_read_and_not_zeros(tmp_path):
    store_of(tmp_path / "s", [b"some text"])
    (shard,) = _shards(tmp_path / "s")
    shard.unlink()
    with pytest.raises(ValueError, match="missing"):
        TokenStore(tmp_path / "s").split("train").tokens.read().result()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "s").mkdir()
    store_of(tmp_path / "s", [b"into an empty folder"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(
        UserError, match=r"config.data.store=.*mine: holds something that is not a complete token store"
    ):
        store_of(tmp_path / "mine", [b"text"])
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_nothing_to_train_on_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"config.data.source=stdlib: has no documents for training"):
        store_of(tmp_path / "s", [])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_split_a_missing_store_and_a_damaged_one_are_named(tmp_path):
    store = store_of(tmp_path / "s", [b"text"])
    with pytest.raises(UserError, match="--split=validation: no document"):
        store.split("validation")
    with pytest.raises(UserError, match=r"config.data.store=.*nowhere: is not a token store"):
        TokenStore(tmp_path / "nowhere")
    (tmp_path / "s/store.json").write_text(json.dumps(store.meta)[:50])
    with pytest.raises(UserError, match=r"store.json is damaged"):
        TokenStore(tmp_path / "s")
    other = json.dumps(store.meta).replace('"n_bytes": 4', '"n_bytes": 5')
    assert other != json.dumps(store.meta)
    (tmp_path / "s/store.json").write_text(other)
    with pytest.raises(UserError, match=r"s/store.json is damaged"):
        TokenStore(tmp_path / "s")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> pathlib.Path:
    """A small model with SentencePiece's own ids (unknown 0), trained here."""
    path = tmp_path_factory.mktemp("vocab")
    text = path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path / "m"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return path / "m.model"


def test_sentencepiece_text_comes_back(tmp_path, sentencepiece_model):
    vocab = SentencePieceVocab(sentencepiece_model)
    text = "the lazy fox jumps over the dog"
    store = store_of(tmp_path / "s", [text.encode()], vocab)
    tokens = store.split("train").tokens.read().result()
    assert tokens[-1] == END_OF_DOC
    assert (tokens[:-1] >= N_SPECIAL).all()
    assert store.split("train").doc_bytes[0] == len(text)
    decoder = store.vocab().decoder()
    pieces = [decoder.decode(int(token)) for token in tokens[:-1]]
    assert "".join(pieces) + decoder.decode(0, final=True) == text
    assert sum(map(bool, pieces)) > 3  # piece by piece, not all at the end


def test_what_a_vocabulary_does_not_know_is_unknown(sentencepiece_model):
    vocab = SentencePieceVocab(sentencepiece_model)
    assert 2 in vocab.encode("the 漢 fox".encode())
    assert vocab.encode(b"the fox").max() < vocab.n_vocab


def test_a_model_with_our_special_ids_is_taken_as_it_is(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=320, byte_fallback=True, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, model_type="bpe",
    )  # fmt: skip
    vocab = SentencePieceVocab(tmp_path / "m.model")
    assert vocab.n_vocab == 320
    text = "the fox 漢 é\U0001f600!"
    tokens = vocab.encode(text.encode())
    assert tokens.min() >= N_SPECIAL
    decoder = vocab.decoder()
    decoded = "".join(decoder.decode(int(token)) for token in tokens) + decoder.decode(0, final=True)
    assert decoded == text


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"config.data.vocab=.*x.model: the file is not a SentencePiece model"):
        SentencePieceVocab(tmp_path / "x.model")
    with pytest.raises(
        UserError, match=r"config.data.vocab=.*y.model: must be 'bytes', 'sentencepiece', a SentencePiece model or a"
    ):
        SentencePieceVocab(tmp_path / "y.model")


def test_bytes_decode_to_text_as_soon_as_a_character_is_whole():
    decoder = ByteVocab().decoder()
    pieces = [decoder.decode(int(token)) for token in ByteVocab().encode("aé漢".encode())]
    assert pieces == ["a", "", "é", "", "", "漢"]
    assert decoder.decode(N_SPECIAL + 0xC3) == ""
    assert decoder.decode(0, final=True) == "\ufffd"


@pytest.mark.parametrize("array", ["tokens", "starts", "doc_bytes"])
def test_an_array_of_another_length_is_damage_also_in_a_store_without_checksums_of_shapes(tmp_path, array):
    """One bit of zarr.json, which has no checksum of its own, may make an array shorter."""
    store = store_of(tmp_path / "store", [b"one", b"two", b"three"])
    path = store.path / "train" / array / "zarr.json"
    meta = json.loads(path.read_text())
    meta["shape"][0] -= 1
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"zarr.json has changed \(CRC-32C\)"):
        TokenStore(store.path).split("train")
    older = {name: value for name, value in store.meta.items() if name not in ("arrays", "crc32c")}
    (store.path / "store.json").write_text(json.dumps(older | dict(crc32c=store_module.crc32c_of(older))))
    with pytest.raises(UserError, match=r"does not have the documents of store.json"):
        TokenStore(store.path).split("train")
