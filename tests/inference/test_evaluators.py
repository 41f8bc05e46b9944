"""Evaluation with quadratic attention: every document begins with an update of its own."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.common import model_params, store_of
from tests.inference.test_batched import FULL, alone
from tests.inference.test_recall import SETTINGS, guess
from tests.inference.test_recall import store as recall_store  # noqa: F401
from tvq_pod.config.settings import EvalSettings, MeshSettings
from tvq_pod.data.vocab import END_OF_DOC, ByteVocab
from tvq_pod.inference import evaluator as eval_module
from tvq_pod.inference import evaluators as evaluators_module
from tvq_pod.inference import scorer as scorer_module
from tvq_pod.inference.evaluator import Evaluator
from tvq_pod.inference.evaluators import QuadraticEvaluator, make_evaluator
from tvq_pod.parallel.mesh import make_mesh

TEXTS = [b"x" * n + b"end" for n in (1, 28, 9, 3, 17, 12, 5)]  # up to 32 tokens, which is two updates of training


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    for module in (eval_module, evaluators_module):
        monkeypatch.setattr(module, "BUCKET", 8)


def evaluated(store, update_len):
    mesh = make_mesh(MeshSettings(), jax.devices()[:2])
    settings = dataclasses.replace(FULL, eval=EvalSettings(batch_size=4, update_len=update_len))
    return make_evaluator(settings, mesh, store, "train", per_document=True).evaluate(model_params(FULL.model))


@pytest.mark.slow(2)
def test_quadratic_attention_sees_all_of_a_document(tmp_path):
    store = store_of(tmp_path / "store", TEXTS)
    documents = [[*ByteVocab().encode(text).tolist(), END_OF_DOC] for text in TEXTS]
    losses = [alone(document)[0] for document in documents]
    by_bucket = np.zeros(4)
    for nats in losses:
        for place, loss in enumerate(nats):
            by_bucket[place // 8] += loss
    result = evaluated(store, 32)
    assert result.tokens == sum(map(len, losses))
    assert result.loss * result.tokens == pytest.approx(sum(map(np.sum, losses)), rel=1e-5)
    np.testing.assert_allclose(result.by_document, [np.sum(nats) for nats in losses], rtol=1e-5)
    np.testing.assert_allclose(result.by_position.nats, by_bucket, rtol=1e-5)


def test_documents_longer_than_an_update_are_said_to_be_read_in_pieces(tmp_path, capfd):
    store = store_of(tmp_path / "store", TEXTS)
    whole, pieces = evaluated(store, 32), evaluated(store, 16)
    assert "config.eval.update_len=16: the longest document has 32 tokens" in capfd.readouterr().err
    same = np.isclose(whole.by_document, pieces.by_document, rtol=1e-5)
    assert same.tolist() == [len(text) < 16 for text in TEXTS]


@pytest.mark.slow(2)
def test_values_are_counted_as_those_of_rows_are(recall_store, monkeypatch):  # noqa: F811
    """With something that is no model: its losses and hits depend on two tokens alone."""

    def made_up_step(settings, mesh, n_rows, with_hits):
        def step(params, state, batch):
            losses, hits = guess(batch["inputs"], batch["targets"])
            return state, losses * batch["loss_mask"], hits

        return step

    for module in (eval_module, scorer_module):
        monkeypatch.setattr(module, "make_eval_step", made_up_step)
        monkeypatch.setattr(module, "make_eval_state", lambda *args: {})
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    expected = Evaluator(SETTINGS, mesh, recall_store, "validation").evaluate({})
    settings = dataclasses.replace(SETTINGS, eval=EvalSettings(update_len=2000))
    evaluator = QuadraticEvaluator(settings, mesh, recall_store, "validation", per_document=False)
    evaluator.evaluate({})
    result = evaluator.evaluate({})  # the second counts nothing of the first
    np.testing.assert_array_equal(result.recall.n_values, expected.recall.n_values)
    np.testing.assert_array_equal(result.recall.hits, expected.recall.hits)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
