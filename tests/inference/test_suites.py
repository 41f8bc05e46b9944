"""Suites of long documents: what is hidden where, how it is counted, and that any vocabulary and job measures alike."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import sentencepiece
import tokenizers
from etils import epath

from tests.command import metrics_of
from tests.inference.conftest import SETTINGS
from tests.parallel.test_processes import launched
from tvq_pod.config.mode_flags import check_flags
from tvq_pod.config.settings import EvalSettings
from tvq_pod.config.suites import RETRIEVAL, check_suites
from tvq_pod.data.corpora import documents
from tvq_pod.data.recall import distances
from tvq_pod.data.vocab import UNKNOWN, ByteVocab, HuggingFaceVocab, SentencePieceVocab, decoded
from tvq_pod.errors import UserError
from tvq_pod.inference.haystacks import asked, haystack
from tvq_pod.inference.recall import WINDOWS
from tvq_pod.inference.recall_suite import measure_recall, recall_documents
from tvq_pod.inference.retrieval import lengths_up_to, measure_retrieval, write_retrieval
from tvq_pod.modes.evaluate import evaluate_suites

TEXT = [
    f"The old river watched the quiet garden. The pass key is {n}. Magic number: {n * 7}, A! b# C$" for n in range(300)
]
SMALL = EvalSettings(suite_longest=1024, suite_depths=3, suite_trials=2)


def with_eval(how: EvalSettings):
    return dataclasses.replace(SETTINGS, eval=how)


@pytest.fixture(scope="module")
def vocabs(tmp_path_factory) -> dict:
    """Of bytes, and two whose tokens have several letters; tokens of the latter begin with the space before a word."""
    folder = tmp_path_factory.mktemp("vocabs")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "pieces"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "bpe.json"))
    return dict(
        bytes=ByteVocab(),
        pieces=SentencePieceVocab(folder / "pieces.model"),
        bpe=HuggingFaceVocab(folder / "bpe.json"),
    )


@pytest.mark.parametrize("name", ["bytes", "pieces", "bpe"])
@pytest.mark.parametrize("kind", RETRIEVAL)
def test_documents_are_as_long_as_wanted_and_hide_the_answer_at_its_depth(vocabs, name, kind):
    vocab, length = vocabs[name], 2000
    for depth in (0.0, 0.3, 1.0):
        text = haystack(kind, 0, length, depth, 1, SETTINGS.data)
        document = asked(text, length, vocab)
        assert length - 40 < len(document.tokens) <= length
        whole = decoded(document.tokens, vocab)
        answer = decoded(document.tokens[-document.n_answer :], vocab)
        assert answer.strip() == text.answer
        assert whole.endswith(text.question.strip() + " " * (kind != "pair") + text.answer)
        hidden = text.hidden[0][1].strip()
        assert text.answer in hidden
        assert whole.count(hidden) == 1 + (kind == "pair")  # the question and the answer are a pair, too
        place = whole.index(hidden) - len(text.before)
        assert place / (len(whole) - len(text.before) - len(text.question)) == pytest.approx(depth, abs=0.08)


def test_a_document_depends_on_what_it_is_called_and_on_nothing_else():
    names = [
        (kind, seed, length, depth, n)
        for kind in RETRIEVAL
        for seed in (0, 1)
        for length in (600, 700)
        for depth in (0.0, 0.5)
        for n in (0, 1)
    ]
    made = [[asked(haystack(*name, SETTINGS.data), 600, ByteVocab()).tokens.tobytes() for name in names] for _ in "ab"]
    assert made[0] == made[1]
    assert len(set(made[0])) == len(names)


def test_no_answer_is_told_by_what_surrounds_it():
    """Over many documents each first digit comes up, and so does each of the words that are asked for."""
    for kind, n_kinds in (("passkey", 9), ("needle", 9), ("pair", 20)):
        answers = {haystack(kind, 0, 512, 0.5, n, SETTINGS.data).answer[0] for n in range(150)}
        assert len(answers) >= n_kinds
    questions = {haystack("needle", 0, 512, 0.5, n, SETTINGS.data).question for n in range(150)}
    assert len(questions) >= 18


def test_each_cell_counts_its_own_documents():
    """A reader who knows the last two tokens of each document, and all of the shortest and of those that hide the
    answer at the end."""

    def score(documents):
        found = []
        for tokens in documents:
            text = decoded(tokens, ByteVocab())
            knows = len(text) <= 512 or text.index("The pass key is") > 0.8 * len(text)
            hits = np.arange(len(tokens)) >= len(tokens) - (5 if knows else 2)
            found.append((np.where(hits, 0.5, 2.0).astype(np.float32), hits))
        return found

    found = measure_retrieval("passkey", score, ByteVocab(), with_eval(SMALL))
    assert (found.lengths, found.depths) == ((512, 1024), (0, 0.5, 1))
    expected = np.array([[1, 0], [1, 0], [1, 1]])
    np.testing.assert_array_equal(found.answered, expected)
    np.testing.assert_allclose(found.accuracy, np.where(expected, 1, 0.4))
    np.testing.assert_allclose(found.nats, np.where(expected, 2.5, 1.0 + 3 * 2.0))
    numbers = found.numbers()
    assert numbers["answered"] == pytest.approx(4 / 6)
    assert (numbers["answered_512"], numbers["answered_1024"]) == (1, pytest.approx(1 / 3))
    assert numbers["chance"] == 1 / 90_000
    assert numbers["chance_of_token"] == pytest.approx(0.102, abs=1e-3)
    head, *rows, accuracy, loss, last = found.table()
    assert head.split()[-3:] == ["512", "1,024", "tokens"]
    assert [row.split() for row in rows] == [["0%", "100%", "0%"], ["50%", "100%", "0%"], ["100%", "100%", "100%"]]
    assert accuracy.split()[-2:] == ["100.0%", "60.0%"]
    assert loss.split()[-1] == "5.50"
    assert "0.0011%" in last
    assert f"{math.log(90_000):.2f}" in last


def test_the_grid_goes_up_to_the_longest_and_down_to_what_a_question_needs(tmp_path):
    assert lengths_up_to(131_072) == (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
    assert lengths_up_to(3000) == (750, 1500, 3000)
    assert lengths_up_to(512) == (512,)
    found = measure_retrieval("needle", blind, ByteVocab(), with_eval(SMALL))
    assert "one of those in the text 25%" in list(found.table())[-1]
    write_retrieval(found, epath.Path(tmp_path / "eval"), "step_1_needle")
    head, *rows = [line.split("\t") for line in (tmp_path / "eval/step_1_needle.tsv").read_text().splitlines()]
    assert head[:4] == ["length", "depth", "documents", "answered"]
    assert [row[:4] for row in rows[:2]] == [["512", "0.0000", "2", "0.000000"], ["512", "0.5000", "2", "0.000000"]]
    assert len(rows) == 6
    assert (tmp_path / "eval/step_1_needle.png").read_bytes().startswith(b"\x89PNG")


def blind(documents):
    return [(np.ones(len(tokens), np.float32), np.zeros(len(tokens), bool)) for tokens in documents]


@pytest.mark.slow(2)
def test_recall_in_bytes_has_the_documents_and_distances_of_the_corpus():
    """What `distances` finds by looking at the tokens alone."""
    settings = with_eval(dataclasses.replace(SMALL, suite_longest=3000))
    corpus = dataclasses.replace(settings.data, source="recall", recall_bytes=3000, recall_held_out=2)
    made = recall_documents(ByteVocab(), settings)
    texts = [bytes(document.text) for document in documents(corpus) if document.split == "test"]
    assert [decoded(document.tokens, ByteVocab()).encode() for document in made] == texts
    for document in made:
        found = np.zeros(len(document.tokens), np.int32)
        found[document.begins] = document.distances
        np.testing.assert_array_equal(found, distances(document.tokens, np.zeros(len(found), np.int32)))
        np.testing.assert_array_equal(document.ends, document.begins + 1)


def test_recall_counts_a_value_if_all_of_its_tokens_are_known(vocabs):
    """Values of two tokens, of which a reader knows the first everywhere and the second in the first half."""
    settings = with_eval(SMALL)
    vocab = vocabs["pieces"]

    def score(documents):
        found = []
        for tokens in documents:
            hits = np.arange(len(tokens)) < len(tokens) // 2
            hits |= np.array([decoded(tokens[k : k + 1], vocab).strip() == "" for k in range(len(tokens))])
            found.append((np.full(len(tokens), 0.25, np.float32), hits))
        return found

    made = recall_documents(vocab, settings)
    n_tokens = np.concatenate([document.ends - document.begins for document in made])
    assert n_tokens.max() == 2
    found = measure_recall(score, vocab, settings)
    is_early = np.concatenate([document.ends <= len(document.tokens) // 2 for document in made])
    kinds = np.concatenate([document.distances for document in made])
    kinds = np.searchsorted(np.array(WINDOWS) * settings.model.mem_len, kinds)
    np.testing.assert_array_equal(found.n_values, np.bincount(kinds, minlength=6))
    np.testing.assert_array_equal(found.hits, np.bincount(kinds, is_early, minlength=6))
    np.testing.assert_allclose(found.nats, np.bincount(kinds, 0.25 * n_tokens, minlength=6))
    for document in made:
        assert len(document.tokens) <= 1024
        for begin, end, back in zip(document.begins, document.ends, document.distances, strict=True):
            same = document.tokens[begin - back : end - back]
            np.testing.assert_array_equal(document.tokens[begin:end], same)


@pytest.mark.slow(2)
def test_a_run_is_asked_and_what_is_found_is_written(workdir, loaded, capsys):
    """Of a model that has learned nothing; the loss is that of `LoadedModel.score_tokens`."""
    how = EvalSettings(suite_longest=512, suite_depths=2, suite_trials=1, suite_seed=5)
    settings = dataclasses.replace(loaded.settings, eval=how)
    evaluate_suites(settings, epath.Path(workdir), ["passkey", "recall"], None)
    passkey, recall = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (passkey["step"], passkey["suite"], recall["suite"]) == (3, "passkey", "recall")
    texts = [asked(haystack("passkey", 5, 512, depth, 0, settings.data), 512, ByteVocab()) for depth in (0.0, 1.0)]
    scores = loaded.score_tokens([text.tokens for text in texts])
    nats = [-score[-5:].sum() for score in scores]
    assert passkey["answer_loss"] == pytest.approx(np.mean(nats), rel=1e-4)
    for name, found in (("passkey", passkey), ("recall", recall)):
        (line,) = metrics_of(workdir, name)
        assert {key: line[key] for key in found if key != "suite"} == {k: v for k, v in found.items() if k != "suite"}
        assert line["weights"] == "raw"
        assert (workdir / f"eval/step_3_{name}.tsv").exists()
        assert (workdir / f"eval/step_3_{name}.png").exists()


@pytest.mark.slow(20)
def test_processes_of_a_job_measure_what_one_does(workdir, loaded, capsys):
    how = EvalSettings(suite_longest=512, suite_depths=2, suite_trials=1)
    evaluate_suites(dataclasses.replace(loaded.settings, eval=how), epath.Path(workdir), ["pair"], None)
    expected = json.loads(capsys.readouterr().out)
    flags = ["--mode=eval", f"--workdir={workdir}", "--suite=pair", "--config.eval.suite_longest=512"]
    flags += ["--config.eval.suite_depths=2", "--config.eval.suite_trials=1"]
    job = launched("--processes=2", "--devices_per_process=2", "--", *flags)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    (line,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    words = {name for name, value in expected.items() if isinstance(value, str)}
    assert {name: line.pop(name) for name in words} == {name: expected.pop(name) for name in words}
    assert line == pytest.approx(expected, rel=1e-4)


class NoDigits(ByteVocab):
    """Bytes, but for digits and some punctuation."""

    name = "no digits"

    def encode(self, text: bytes) -> np.ndarray:
        return np.array([UNKNOWN if byte in b"0123456789!" else byte + 3 for byte in text], np.uint16)


class NoCase(ByteVocab):
    name = "no case"

    def encode(self, text: bytes) -> np.ndarray:
        return super().encode(text.lower())


class NoText(ByteVocab):
    """Knows digits, and nothing else."""

    name = "no text"

    def encode(self, text: bytes) -> np.ndarray:
        return super().encode(bytes(byte for byte in text if byte in b"0123456789"))


def test_a_vocabulary_that_can_not_ask_is_one_line():
    settings, more_keys = with_eval(SMALL), dataclasses.replace(SETTINGS.data, recall_keys=62)
    for vocab, kind, message in [
        (NoDigits(), "passkey", "--suite: the vocabulary no digits can't encode the answer '"),
        (NoText(), "needle", "--suite: the vocabulary no text can't make a document of 512 tokens of 'Some magic"),
        (NoDigits(), "recall", "--suite=recall: the vocabulary no digits can't encode '0'"),
        (NoCase(), "recall", "--suite=recall: the vocabulary no case can't distinguish 'A' from 'a'"),
    ]:
        measure = measure_recall if kind == "recall" else functools.partial(measure_retrieval, kind)
        with pytest.raises(UserError) as refused:
            measure(blind, vocab, dataclasses.replace(settings, data=more_keys))
        assert str(refused.value).startswith(message)


def test_what_is_no_suite_or_has_no_room_is_one_line():
    for names, message in [
        (["recal"], "--suite=recal: recal is not a suite; give some of recall, passkey, needle, pair"),
        ([], "--suite=: names no suite"),
        (["pair", "pair"], "--suite=pair,pair: has pair twice"),
    ]:
        with pytest.raises(UserError) as refused:
            check_suites(names)
        assert str(refused.value).startswith(message)
    for flag in ("split", "per_document"):
        with pytest.raises(UserError, match=f"^--{flag}: is about documents of the store; leave it out with --suite"):
            check_flags("eval", ["suite", flag])
    many = dataclasses.replace(with_eval(SMALL), data=dataclasses.replace(SETTINGS.data, recall_key_bytes=2))
    for changes, message in [
        (
            dict(recall_pairs=400, recall_keys=400),
            "config.eval.suite_longest=1024: has room for 341 pairs, which is no more",
        ),
        (dict(recall_pairs=40), "config.data.recall_pairs=40: a document can't have more different keys than there"),
    ]:
        with pytest.raises(UserError) as refused:
            recall_documents(ByteVocab(), dataclasses.replace(many, data=dataclasses.replace(many.data, **changes)))
        assert str(refused.value).startswith(message)
