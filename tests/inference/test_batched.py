"""Many documents scored at once: each has the score that it has alone, with quadratic attention too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import model_params
from tests.made_run import settings_of
from tvq_pod.config.settings import EvalSettings, MeshSettings
from tvq_pod.data.vocab import END_OF_DOC, ByteVocab
from tvq_pod.errors import UserError
from tvq_pod.inference import scorer
from tvq_pod.inference.batched import BatchedModel
from tvq_pod.inference.lm_eval_model import SharedModel
from tvq_pod.nn.model import Transformer
from tvq_pod.parallel.mesh import make_mesh

FULL = dataclasses.replace(
    settings_of(attn_type="full", head_type="mqa", block_len=16), eval=EvalSettings(batch_size=4)
)
LENGTHS = (26, 0, 5, 16, 32, 31, 1, 17)  # of documents: up to two updates of 16 tokens


def documents_of(lengths):
    return [np.random.default_rng(length).integers(3, 259, length) for length in lengths]


def alone(document):
    """Losses and hits of the model over one document, by itself and in one update."""
    config = FULL.model.replace(is_train=False)
    padded = np.zeros([1, 32], np.int32)
    padded[0, : len(document)] = [END_OF_DOC, *document[:-1]] if len(document) else []
    logits = np.asarray(_forward(config)(model_params(config), padded))[0, : len(document)]
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(document)), document]
    return losses, logits.argmax(-1) == document


@functools.cache
def _forward(config):
    @jax.jit
    def forward(params, tokens):
        state = Transformer.initial_state(config, 1)
        return Transformer(config).apply({"params": params}, state, tokens, jnp.zeros_like(tokens))[1]["logits"]

    return forward


@pytest.mark.slow(4)
@pytest.mark.parametrize("with_hits", [True, False])
def test_quadratic_attention_sees_each_document_from_its_beginning(monkeypatch, with_hits):
    """Also where the logits of the longest documents have room in one row of each device only."""
    monkeypatch.setattr(scorer, "LOGIT_BYTES", 4 * 31 * FULL.model.n_vocab)
    mesh = make_mesh(MeshSettings(), jax.devices()[:2])
    model = BatchedModel(FULL, model_params(FULL.model), ByteVocab(), mesh, shows_progress=False)
    documents = documents_of(LENGTHS)
    for document, (nats, hits) in zip(documents, model.score(documents, with_hits=with_hits), strict=True):
        expected, is_likeliest = alone(document)
        np.testing.assert_allclose(nats, expected, atol=1e-4)
        np.testing.assert_array_equal(hits, is_likeliest & with_hits)


def test_tasks_that_generate_are_refused_where_a_sampler_sees_only_the_window():
    model = BatchedModel(FULL, {}, ByteVocab(), make_mesh(MeshSettings(), jax.devices()[:1]), shows_progress=False)
    with pytest.raises(UserError, match=r"^config\.model\.attn_type=full: a sampler keeps only its window"):
        SharedModel(model).continue_until(documents_of([3]), stops=[], length=2, temperature=0.0, top_p=1.0)
