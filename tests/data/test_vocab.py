"""Vocabularies: text comes back from its tokens, also when it was too long to be encoded at once."""

import importlib.util
import itertools
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.common import store_of
from tvq_pod.data.train_vocab import sample, train_sentencepiece
from tvq_pod.data.vocab import (
    END_OF_DOC,
    N_SPECIAL,
    UNKNOWN,
    ByteVocab,
    HuggingFaceVocab,
    SentencePieceVocab,
    decoded,
    load_vocab,
    pieces,
)
from tvq_pod.errors import UserError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "été", "漢字", "don't"]
any_character = st.characters(exclude_categories=["Cs"])
TEXT = " ".join(itertools.islice(itertools.cycle(WORDS), 300)).encode() + b"\n\n  indented\tand done.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocab")


def trained(folder):
    (folder / "own.model").write_bytes(train_sentencepiece([TEXT] * 3, 320))
    return SentencePieceVocab(folder / "own.model")


def with_dummy_prefix(folder):
    """As most models that one finds: a space before every text, and runs of spaces made one."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.decode().split("\n")), model_prefix=str(folder / "common"), vocab_size=320,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return SentencePieceVocab(folder / "common.model")


def with_dummy_prefix_only(folder):
    """A space before every text, and all others as they are."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.decode().split("\n")), model_prefix=str(folder / "keeps"), vocab_size=320,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, remove_extra_whitespaces=False, model_type="bpe",
    )  # fmt: skip
    return SentencePieceVocab(folder / "keeps.model")


def byte_level(folder):
    """As GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT.decode()], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "gpt.json"))
    return HuggingFaceVocab(folder / "gpt.json")


MAKERS = dict(
    bytes=lambda folder: ByteVocab(), trained=trained, common=with_dummy_prefix, keeps=with_dummy_prefix_only,
    gpt=byte_level,
)  # fmt: skip


@pytest.fixture(scope="module")
def vocabs(folder):
    return {name: make(folder) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("at_most", [60, 100, 333, 1000])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(vocabs, name, at_most):
    rng = random.Random(0)  # runs of spaces, too, which may not be cut just anywhere
    text = "".join(word + rng.choice([" ", "  ", " \n", "\n "]) for word in WORDS * 30).encode() + b"end"
    vocab = vocabs[name]
    parts = list(pieces(text, vocab, at_most))
    assert len(parts) > 1
    assert max(map(len, parts)) <= at_most
    np.testing.assert_array_equal(np.concatenate([vocab.encode(part) for part in parts]), vocab.encode(text))


@pytest.mark.parametrize("name", ["bytes", "trained", "gpt"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from([" ", "\n", "\u2581", "fox", "é"]) | any_character, max_size=60).map("".join))
def test_text_comes_back_byte_for_byte_from_pieces_of_any_size(vocabs, name, text):
    """Unicode, control characters, runs of spaces, and the character by which SentencePiece writes a space."""
    vocab = vocabs[name]
    for at_most in (7, 1000):
        ids = [vocab.encode(part) for part in pieces(text.encode(), vocab, at_most)]
        ids = np.concatenate([*ids, [END_OF_DOC]]).astype(int)
        assert decoded(ids, vocab) == text
        assert ids.max() < vocab.n_vocab
        assert UNKNOWN not in ids


@pytest.mark.parametrize("name", ["common", "keeps"])
def test_models_that_put_a_space_before_every_text_are_given_each_text_once(vocabs, name):
    """For them the character that stands for a space is one."""
    assert decoded(vocabs[name].encode("the\u2581fox".encode()), vocabs[name]) == "the fox"


def test_pieces_are_cut_between_characters_where_there_is_no_space(vocabs):
    text = ("漢" * 50).encode()
    assert b"".join(pieces(text, vocabs["trained"], 20)) == text
    assert all(part.decode() for part in pieces(text, vocabs["trained"], 20))


def test_a_model_that_takes_spaces_away_is_given_the_whole_text(folder):
    """It strips each text it is given, so that a cut would lose a space."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.decode().split("\n")), model_prefix=str(folder / "strip"), vocab_size=320,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False,
    )  # fmt: skip
    assert list(pieces(TEXT, SentencePieceVocab(folder / "strip.model"), 50)) == [TEXT]


def test_what_looks_like_a_special_token_is_text(vocabs):
    vocab = vocabs["gpt"]
    ids = vocab.encode(b"a<|endoftext|>b")
    assert len(ids) > 3  # neither cut at five tokens nor ended by one of its own
    assert vocab.encode(b"").size == 0
    assert decoded(ids, vocab) == "a<|endoftext|>b"
    assert ids.min() >= N_SPECIAL


def test_a_tokenizer_that_gives_every_text_a_space_is_given_the_whole_text(folder):
    """As Llama's: a piece would get one, too."""
    file = json.loads((folder / "gpt.json").read_text())
    file["normalizer"] = {"type": "Prepend", "prepend": " "}
    (folder / "prepend.json").write_text(json.dumps(file))
    assert not HuggingFaceVocab(folder / "prepend.json").can_be_cut
    assert HuggingFaceVocab(folder / "gpt.json").can_be_cut


@pytest.mark.parametrize("name", ["common", "keeps"])
def test_no_space_is_put_into_a_long_text_that_has_none(vocabs, name):
    for text in ("漢字" * 100, "漢字" * 100 + " the fox " + "é" * 100):
        assert len(list(pieces(text.encode(), vocabs[name], 50))) == 1 + text.count(" the")
        ids = [vocabs[name].encode(part) for part in pieces(text.encode(), vocabs[name], 50)]
        assert decoded(np.concatenate(ids), vocabs[name]) == text


def test_a_text_that_a_tokenizer_does_not_know_is_named(folder):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    tokenizer.save(str(folder / "narrow.json"))
    with pytest.raises(UserError, match=r"config.data.vocab: the tokenizer can't encode 'b'"):
        HuggingFaceVocab(folder / "narrow.json").encode(b"b")


def test_lines_of_a_large_corpus_are_drawn_evenly():
    lines = [f"{n:09}" for n in range(10_000)]
    assert sample(iter(lines), 90_000) == lines
    kept = sample(iter(lines), 10_000)
    assert kept == lines[::16]
    assert sample(iter([]), 5) == []


def test_a_tokenizer_with_our_special_ids_is_taken_as_it_is(folder):
    tokens = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "the", "fox"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "same.json"))
    vocab = HuggingFaceVocab(folder / "same.json")
    assert vocab.encode(b"the quick fox").tolist() == [3, UNKNOWN, 4]
    assert vocab.encode(b"the </s> <pad> fox").tolist() == [3, UNKNOWN, UNKNOWN, 4]
    assert vocab.n_vocab == 5
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "other.json"))
    other = load_vocab(folder / "other.json")
    assert (other.encode(b"a b").tolist(), other.n_vocab) == ([N_SPECIAL, UNKNOWN], 5)


@pytest.mark.parametrize("name", ["trained", "gpt"])
def test_a_store_has_its_vocabulary_with_it(vocabs, name, tmp_path):
    vocab = vocabs[name]
    store = store_of(tmp_path / "s", [TEXT], vocab)
    (tmp_path / "s").rename(tmp_path / "moved")
    moved = type(store)(tmp_path / "moved")
    assert moved.vocab().name == vocab.name
    assert decoded(moved.split("train").tokens.read().result(), moved.vocab()).encode() == TEXT


def test_a_trained_vocabulary_has_ids_as_documented_and_is_the_same_every_time(folder):
    model = train_sentencepiece([TEXT], 300)
    assert train_sentencepiece([memoryview(TEXT)], 300) == model
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    assert pieces.vocab_size() == 300
    assert pieces.piece_to_id("\n") == 3


def test_a_vocabulary_larger_than_its_text_can_give_is_refused():
    with pytest.raises(UserError, match=r"config.data.vocab_size=5000: must be at most \d+ here"):
        train_sentencepiece([b"so little text"], 5000)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps(dict(a=1)))
    with pytest.raises(UserError, match=r"config.data.vocab=.*x.json: the file is not a Hugging Face tokenizer"):
        load_vocab(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"config.data.vocab=.*y.json: must be 'bytes', 'sentencepiece'"):
        load_vocab(tmp_path / "y.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config.data.vocab=.*x.json: .* needs pip install -e '\.\[data\]'"):
        load_vocab(tmp_path / "x.json")
