"""Evaluation: each document whole, with its full context, whatever lies beside it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.common import model_params, pg19_like, small_config, store_of
from tvq_pod.config.identity import run_record
from tvq_pod.config.settings import EvalSettings, MeshSettings, Settings, TrainSettings
from tvq_pod.data.streams import PADDING, PackedDocuments
from tvq_pod.data.vocab import END_OF_DOC, ByteVocab
from tvq_pod.errors import UserError
from tvq_pod.inference import by_position as positions
from tvq_pod.inference import evaluator as eval_module
from tvq_pod.inference.evaluator import Evaluator
from tvq_pod.modes import evaluate as evaluate_module
from tvq_pod.nn.model import Transformer
from tvq_pod.parallel.mesh import make_mesh

SETTINGS = Settings(
    model=small_config(n_vocab=ByteVocab.n_vocab, pe_abs=True, block_len=4, mem_len=2, n_layer=1),
    train=TrainSettings(batch_size=8, update_len=12),
    eval=EvalSettings(batch_size=8),
)
TEXTS = [b"x" * n + b"the end" for n in (1, 3, 50, 20, 7, 90, 12, 33, 5, 2, 60)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("eval") / "store", TEXTS)


@pytest.fixture
def small_buckets(monkeypatch):
    """Losses by place in the document, for every 16 places."""
    monkeypatch.setattr(positions, "BUCKET", 16)
    monkeypatch.setattr(eval_module, "BUCKET", 16)


@pytest.fixture(autouse=True)
def _compiled_once(monkeypatch):
    monkeypatch.setattr(eval_module, "make_eval_step", compiled_step)


real_make_eval_step = eval_module.make_eval_step


def compiled_step(settings, mesh, n_rows, with_hits):
    assert not with_hits, "nobody asks a corpus of text for them"
    # how many tokens are evaluated is no part of the step
    return _compiled_step(dataclasses.replace(settings, eval=EvalSettings(cache=settings.eval.cache)), mesh, n_rows)


@functools.cache
def _compiled_step(settings, mesh, n_rows):
    return real_make_eval_step(settings, mesh, n_rows)


def evaluate(store, n_devices=1, **changes):
    settings = dataclasses.replace(SETTINGS, eval=EvalSettings(**(dict(batch_size=8) | changes)))
    mesh = make_mesh(MeshSettings(), jax.devices()[:n_devices])
    params = jax.device_put(model_params(SETTINGS.model), jax.NamedSharding(mesh, jax.P()))
    return Evaluator(settings, mesh, store, "train", per_document=True).evaluate(params)


@pytest.mark.slow(2)
@pytest.mark.parametrize("cache", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_loss_is_that_of_each_document_alone(store, small_buckets, cache):
    """The slow version: one document at a time, in one block, from a fresh state; without the cache, in blocks of which
    each sees the window before it. At every place of the documents, too."""
    length = 100
    config = SETTINGS.model.replace(block_len=length if cache == "on" else 4, agg_cache=cache == "on")

    @jax.jit
    def log_probs(params, tokens):
        _, out = Transformer(config).apply(
            {"params": params}, Transformer.initial_state(config, 1), tokens, jnp.zeros_like(tokens)
        )
        return jax.nn.log_softmax(out["logits"])[0]

    nats, n_tokens, by_document = np.zeros(7), np.zeros(7, int), np.zeros(len(TEXTS))
    for number, text in enumerate(TEXTS):
        targets = [*ByteVocab().encode(text).tolist(), END_OF_DOC]
        inputs = np.zeros([1, length], np.int32)
        inputs[0, : len(targets)] = [END_OF_DOC, *targets[:-1]]
        probs = np.asarray(log_probs(model_params(SETTINGS.model), inputs))
        for i, target in enumerate(targets):
            nats[i // 16] -= float(probs[i, target])
            by_document[number] -= float(probs[i, target])
            n_tokens[i // 16] += 1
    result = evaluate(store, cache=cache)
    assert result.tokens == n_tokens.sum()
    assert result.documents == len(TEXTS)
    assert result.loss == pytest.approx(nats.sum() / n_tokens.sum(), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / sum(map(len, TEXTS)), rel=1e-5)
    np.testing.assert_array_equal(result.by_position.n_tokens, n_tokens)
    np.testing.assert_allclose(result.by_position.nats, nats, rtol=1e-4)
    np.testing.assert_allclose(result.by_document, by_document, rtol=1e-4)
    everywhere = result.by_position.bits_per_byte()
    assert everywhere == pytest.approx(result.bits_per_byte, rel=1e-5)


@pytest.mark.slow(1)
@pytest.mark.parametrize(("n_devices", "batch_size"), [(1, 1), pytest.param(8, 16, marks=pytest.mark.slow)])
def test_the_result_depends_on_neither_rows_nor_mesh(store, small_buckets, n_devices, batch_size):
    expected = evaluate(store)
    result = evaluate(store, n_devices, batch_size=batch_size)
    assert (result.tokens, result.documents) == (expected.tokens, expected.documents)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(result.by_position.nats, expected.by_position.nats, rtol=1e-5)
    np.testing.assert_allclose(result.by_document, expected.by_document, rtol=1e-4)


def test_lines_of_an_evaluation_unlike_that_of_training_have_another_name():
    def name(cache="on", *, is_other=False, **model):
        settings = dataclasses.replace(SETTINGS, eval=EvalSettings(cache=cache), model=SETTINGS.model.replace(**model))
        return evaluate_module._name(settings, "test", run_record(SETTINGS, "bytes", "corpus"), is_other)

    assert name() == name(block_len=2) == "test"
    assert name(cache="off") == "test_cache_off"
    assert name(is_other=True) == "test_weights_raw"
    assert name(dtype="bfloat16") == "test_dtype_bfloat16"
    assert name("off", dtype="bfloat16", param_dtype="half") == "test_cache_off_dtype_bfloat16_param_dtype_half"


def test_max_tokens_evaluates_fewer_documents(store):
    result = evaluate(store, max_tokens=50)
    assert result.documents < len(TEXTS)
    assert result.tokens >= 50
    assert np.isfinite(result.by_document).sum() == result.documents
    assert np.nansum(result.by_document) == pytest.approx(result.loss * result.tokens, rel=1e-5)


def test_a_split_without_documents_is_named(store, eight_devices):
    mesh = make_mesh(MeshSettings(), eight_devices[:1])
    with pytest.raises(UserError, match="--split=test: no document"):
        Evaluator(SETTINGS, mesh, store, "test")


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("n_books", "most", "multiple"), [(50, 128, 1), (100, 128, 4), (400, 128, 8), (50_000, 128, 64)]
)
def test_at_most_a_twentieth_of_the_positions_is_padding(n_books, most, multiple):
    for seed in range(3):
        starts = pg19_like(np.random.default_rng(seed), n_books)
        plan = PackedDocuments.on_most_rows(starts, most, multiple, 2048)
        segments = [segment for row in range(plan.n_rows) for segment in plan.segments(row, 0, plan.row_len)]
        n_positions = plan.n_rows * -(-plan.row_len // 2048) * 2048
        assert plan.padding(2048) == pytest.approx(1 - sum(s.length for s in segments) / n_positions)
        assert sorted((s.start, s.length) for s in segments) == list(
            zip(starts[:-1], np.diff(starts), strict=True)
        )  # fmt: skip
        assert plan.padding(2048) <= PADDING
        assert plan.n_rows <= most
        assert plan.n_rows % multiple == 0


def test_rows_that_can_not_be_equally_long_are_fewer():
    """Three documents on two rows: one row has two of them."""
    assert PackedDocuments.on_most_rows(np.array([0, 100, 200, 300]), 2, 1, 10).n_rows == 1


def test_one_document_that_is_longer_than_all_others_has_as_few_rows_as_the_mesh_can():
    starts = np.array([0, 100_000, 101_000, 102_000])
    assert PackedDocuments.on_most_rows(starts, 128, 1, 64).n_rows == 1
    plan = PackedDocuments.on_most_rows(starts, 128, 8, 64)
    assert plan.n_rows == 8
    assert plan.padding(64) > 0.8


@pytest.mark.slow
def test_as_many_rows_are_taken_as_leave_little_padding(store):
    result = evaluate(store, batch_size=0)
    assert result.padding <= PADDING
    assert result.loss == pytest.approx(evaluate(store).loss, rel=1e-5)


def test_perplexity_of_words_is_over_all_words_of_the_split(store, monkeypatch):
    monkeypatch.setattr(eval_module, "words_of", lambda store, split: 77)
    result = evaluate(store)
    assert result.word_perplexity == pytest.approx(math.exp(result.loss * result.tokens / 77))
    assert evaluate(store, max_tokens=50).word_perplexity is None
    assert set(result.numbers()) >= {"loss", "bits_per_byte", "word_perplexity", "padding"}


def test_the_table_and_files_have_every_token(tmp_path):
    n_tokens = np.array([50, 40, 30, 20, 10, 5, 5, 5, 1])
    found = positions.Positions(n_tokens * 2.0, n_tokens, 1.0)
    lines = list(found.table())[1:]
    assert [line.split()[0] for line in lines] == ["0", "1,024", "2,048", "4,096", "8,192"]
    assert sum(int(line.split()[3].replace(",", "")) for line in lines) == n_tokens.sum()
    positions.write_positions(found, epath.Path(tmp_path), "step_1_test")
    rows = [line.split("\t") for line in (tmp_path / "step_1_test.tsv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == [1024 * k for k in range(9)]
    assert [float(row[3]) for row in rows] == pytest.approx([2 / math.log(2)] * 9)
    assert (tmp_path / "step_1_test.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_many_small_losses_add_up(eight_devices, tmp_path):
    """65,536 positions a step, all of the same loss: float32 would lose a thousandth."""
    model = SETTINGS.model.replace(block_len=64, head_type="mqa", reduction="serial", pe_abs=False)
    settings = dataclasses.replace(
        SETTINGS, train=TrainSettings(batch_size=64, update_len=1024), eval=EvalSettings(batch_size=64), model=model
    )
    store = store_of(tmp_path / "store", [b"x" * 1023] * 64)
    mesh = make_mesh(MeshSettings(), eight_devices[:1])
    params = jax.tree.map(jnp.zeros_like, model_params(model))
    result = Evaluator(settings, mesh, store, "train").evaluate(params)
    assert result.tokens == 65_536
    assert result.loss == pytest.approx(math.log(ByteVocab.n_vocab), rel=1e-6)
