"""Stop strings: how they are spelled, and where they end a text."""

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tvq_pod.config.stop_strings import stop_strings
from tvq_pod.data.vocab import UNKNOWN, ByteVocab, HuggingFaceVocab, SentencePieceVocab, decoded
from tvq_pod.errors import UserError
from tvq_pod.inference.stop import StopText, encodable_stops, until_stop
from tvq_pod.inference.text import text_of

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("", ()),
        ("END", ("END",)),
        (r"\n\n", ("\n\n",)),
        (r"a, b\,\tc\\n\,|", ("a, b", "\tc\\n", "|")),
        ("\n", ("\n",)),
    ],
)
def test_a_text_spells_several_strings(spelled, expected):
    assert stop_strings(spelled) == expected


@pytest.mark.parametrize("spelled", [r"\x", "a\\", r"\,", r"a\,", r"a\,\,b"])
def test_what_spells_no_string_is_refused(spelled):
    with pytest.raises(UserError) as error:
        stop_strings(spelled)
    assert str(error.value).startswith(f"config.sample.stop={spelled}: ")


def cut(text, stops):
    """Before the stop string that is complete first; of those that begin earlier, the longer is not waited for."""
    for end in range(len(text) + 1):
        if found := [text[:end].index(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(found)], end
    return text, None


@given(LETTERS, STOPS)
def test_a_row_ends_with_the_token_that_completes_a_stop_string(text, stops):
    """Characters of two bytes, so that some tokens complete none."""
    text, stops = text.replace("b", "ä"), [stop.replace("b", "ä") for stop in stops]
    expected, end = cut(text, stops)
    row, n_read = StopText(ByteVocab(), stops, ByteVocab().encode(b"before")), 0
    for token in ByteVocab().encode(text.encode()).tolist():
        n_read += 1
        if row.add(token):
            break
    assert row.text() == expected
    assert n_read == len(text[:end].encode())


@pytest.fixture(scope="module")
def vocabs(tmp_path_factory) -> list:
    """Of bytes; of pieces that begin with a space, and bytes; and of words and bytes, with no space of their own."""
    folder = tmp_path_factory.mktemp("vocabs")
    words = [f"the old river watched the garden {n}" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(folder / "pieces"), vocab_size=320, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.save(str(folder / "bpe.json"))
    return [ByteVocab(), SentencePieceVocab(folder / "pieces.model"), HuggingFaceVocab(folder / "bpe.json")]


def test_a_sample_is_the_rest_of_the_text_that_its_prompt_begins(vocabs):
    """It has the space before its first word, and no part of the prompt's last character."""
    n_cuts = 0
    for vocab in vocabs:
        for text in ("the old river", "\u65e5\u672c garden", "\u00e9 river", "\U0001f600 the river"):
            tokens = vocab.encode(text.encode())
            for cut in range(1, len(text)):
                before = vocab.encode(text[:cut].encode())
                if text[cut - 1] == " " or not np.array_equal(tokens[: len(before)], before):
                    continue  # another text would be continued
                n_cuts += 1
                row = StopText(vocab, [], before)
                assert not any([row.add(token) for token in tokens[len(before) :].tolist()])
                assert row.text() == text[cut:]
                assert decoded(tokens[len(before) :], vocab, before) == text[cut:]
                assert "".join(text_of(iter(tokens[len(before) :].tolist()), vocab, before)) == text[cut:]
    assert n_cuts > 30


@given(st.lists(LETTERS, max_size=6), STOPS)
def test_pieces_of_a_text_are_told_up_to_the_first_stop_string(pieces, stops):
    text, told = "".join(pieces), list(until_stop(iter(pieces), stops))
    found = [text.index(stop) for stop in stops if stop in text]
    if len(stops) == 1 or not found:
        assert "".join(told) == text[: min(found, default=len(text))]
    assert text.startswith("".join(told))
    assert not any(stop in "".join(told) for stop in stops)
    if not stops:
        assert told[: len(pieces)] == pieces  # nothing is held back


class Lacking(ByteVocab):
    """Does not know the letter q."""

    name = "lacking"

    def encode(self, text):
        ids = super().encode(text)
        ids[ids == ord("q") + 3] = UNKNOWN
        return ids


def test_a_stop_string_that_the_vocabulary_can_not_encode_is_refused():
    assert encodable_stops(r"a\,q", ByteVocab()) == ("a", "q")
    with pytest.raises(UserError, match=r"config\.sample\.stop=b\\,aq: the vocabulary lacking can't encode 'aq'"):
        encodable_stops(r"b\,aq", Lacking())
    with pytest.raises(UserError, match=r"can't encode '\\udc80'"):
        encodable_stops("\udc80", ByteVocab())  # of a command line that is not UTF-8
