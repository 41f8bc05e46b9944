"""Evaluation: each document whole, with its full context, whatever lies beside it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import small_config, store_of
from tvq_pod.config import EvalSettings, MeshSettings, Settings, TrainSettings
from tvq_pod.data.vocab import END_OF_DOC, ByteVocab
from tvq_pod.errors import UserError
from tvq_pod.eval import Evaluator
from tvq_pod.nn.model import Transformer
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.train_state import create_train_state

SETTINGS = Settings(
    model=small_config(n_vocab=ByteVocab.n_vocab, pe_abs=True, block_len=4, mem_len=2, n_layer=1),
    train=TrainSettings(batch_size=8, update_len=12),
    eval=EvalSettings(batch_size=8),
)
TEXTS = [b"x" * n + b"the end" for n in (1, 3, 50, 20, 7, 90, 12, 33, 5, 2, 60)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("eval") / "store", TEXTS)


@pytest.fixture(scope="module")
def params(eight_devices):
    return create_train_state(SETTINGS, make_mesh(MeshSettings(), eight_devices[:1])).params


def evaluate(store, params, eight_devices, n_devices=1, **changes):
    settings = dataclasses.replace(SETTINGS, eval=EvalSettings(**(dict(batch_size=8) | changes)))
    mesh = make_mesh(MeshSettings(), eight_devices[:n_devices])
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    return Evaluator(settings, mesh, store, "train").evaluate(params)


def test_loss_is_that_of_each_document_alone(store, params, eight_devices):
    """The slow version: one document at a time, in one block, from a fresh state."""
    length = 100
    config = SETTINGS.model.replace(block_len=length)

    @jax.jit
    def log_probs(params, tokens):
        _, out = Transformer(config).apply(
            {"params": params}, Transformer.initial_state(config, 1), tokens, jnp.zeros_like(tokens)
        )
        return jax.nn.log_softmax(out["logits"])[0]

    nats, n_tokens = 0.0, 0
    for text in TEXTS:
        targets = [*ByteVocab().encode(text).tolist(), END_OF_DOC]
        inputs = np.zeros([1, length], np.int32)
        inputs[0, : len(targets)] = [END_OF_DOC, *targets[:-1]]
        probs = np.asarray(log_probs(params, inputs))
        nats -= sum(float(probs[i, target]) for i, target in enumerate(targets))
        n_tokens += len(targets)
    result = evaluate(store, params, eight_devices)
    assert result.tokens == n_tokens
    assert result.documents == len(TEXTS)
    assert result.loss == pytest.approx(nats / n_tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / sum(map(len, TEXTS)), rel=1e-5)


@pytest.mark.parametrize(("n_devices", "batch_size"), [(1, 1), (1, 16), (8, 8)])
def test_the_result_depends_on_neither_rows_nor_mesh(store, params, eight_devices, n_devices, batch_size):
    expected = evaluate(store, params, eight_devices)
    result = evaluate(store, params, eight_devices, n_devices, batch_size=batch_size)
    assert (result.tokens, result.documents) == (expected.tokens, expected.documents)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)


def test_max_tokens_evaluates_fewer_documents(store, params, eight_devices):
    result = evaluate(store, params, eight_devices, max_tokens=50)
    assert result.documents < len(TEXTS)
    assert result.tokens >= 50


def test_a_split_without_documents_is_named(store, eight_devices):
    mesh = make_mesh(MeshSettings(), eight_devices[:1])
    with pytest.raises(UserError, match="--split=test: no document"):
        Evaluator(SETTINGS, mesh, store, "test")
