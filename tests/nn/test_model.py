"""The whole model: documents never meet, updates are seamless, and each option does what its name says."""

import functools
import math
import re
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import model_params, rngs_fixture, small_config
from tvq_pod.nn.codebook import is_codebook
from tvq_pod.nn.model import Transformer, embed, is_vector
from tvq_pod.nn.state import doc_positions
from tvq_pod.nn.types import TransformerConfig

TOTAL = 24


@functools.cache
def compiled_model(config):
    """(state, inputs, doc_ids) -> (state, logits)."""

    @jax.jit
    def apply(params, state, inputs, doc_ids):
        state, out = Transformer(config).apply({"params": params}, state, inputs, doc_ids, rngs=rngs_fixture())
        return state, out["logits"]

    return functools.partial(apply, model_params(config))


def run(config, inputs, doc_ids, update_len=TOTAL):
    """Logits [B, TOTAL, n_vocab], by updates of update_len with the state carried."""
    state, parts = Transformer.initial_state(config, len(inputs)), []
    for begin in range(0, inputs.shape[1], update_len):
        part = slice(begin, begin + update_len)
        state, logits = compiled_model(config)(state, inputs[:, part], doc_ids[:, part])
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


def random_tokens(batch_size=1, seed=0):
    return np.random.default_rng(seed).integers(0, 11, size=[batch_size, TOTAL]).astype(np.int32)


@pytest.mark.slow(4)
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), update_len=st.sampled_from([4, TOTAL]))
def test_a_document_never_sees_its_neighbours(lengths, update_len):
    config = small_config(pe_abs=True, mem_len=3)
    lengths = [*lengths, max(TOTAL - sum(lengths), 0)]
    doc_ids = np.repeat(np.arange(len(lengths)), lengths)[:TOTAL].astype(np.int32)[None]
    inputs = random_tokens(seed=sum(lengths))
    together = run(config, inputs, doc_ids, update_len)
    for doc_id in np.unique(doc_ids):
        (places,) = np.nonzero(doc_ids[0] == doc_id)
        alone = np.zeros_like(inputs)
        alone[0, : len(places)] = inputs[0, places]
        expected = run(config, alone, np.zeros_like(doc_ids))
        np.testing.assert_allclose(together[0, places], expected[0, : len(places)], atol=1e-4)


@pytest.mark.slow(2)
def test_context_matters_within_a_document():
    config = small_config(pe_abs=True, mem_len=3)
    inputs, doc_ids = random_tokens(), np.zeros([1, TOTAL], np.int32)
    changed = inputs.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 11
    difference = np.abs(run(config, inputs, doc_ids) - run(config, changed, doc_ids)).max(axis=-1)[0]
    assert difference[-1] > 1e-5  # 23 tokens later, far beyond the window: through the cache


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "changes",
    [
        slow(dict(n_head=1, e_tie=True, e_scale=0.5, n_layer=1)),
        slow(dict(n_head=3, e_norm=False, unroll=2)),
        slow(dict(head_type="mqa")),
        slow(dict(head_type="mha", d_v=4, agg_cache=False, n_layer=1)),
    ],
    ids=str,
)
def test_updates_are_seamless(changes):
    config = small_config(**changes)
    inputs = random_tokens(2)
    doc_ids = np.sort(np.random.default_rng(0).integers(0, 3, size=[2, TOTAL]), axis=1).astype(np.int32)
    np.testing.assert_allclose(run(config, inputs, doc_ids, 8), run(config, inputs, doc_ids, TOTAL), atol=1e-4)


@pytest.mark.slow
def test_tied_embeddings_have_no_output_matrix_and_e_scale_scales_logits():
    tied, untied = (small_config(e_tie=e_tie, n_layer=1, head_type="mqa") for e_tie in (True, False))
    assert "w_out" in model_params(untied)
    assert "w_out" not in model_params(tied)
    inputs, doc_ids = random_tokens(), np.zeros([1, TOTAL], np.int32)
    scaled = run(tied.replace(e_scale=0.25), inputs, doc_ids)
    np.testing.assert_allclose(scaled, run(tied, inputs, doc_ids) * 0.25, atol=1e-5)


def test_positions_of_tokens_in_their_documents():
    doc_ids = np.array([[3, 3, 4, 4, 4, 5], [0, 0, 0, 0, 0, 0], [7, 8, 9, 9, 9, 9]], np.int32)
    window = np.array([[2, 3], [-1, -1], [6, 6]], np.int32)
    state = dict(xlcache=dict(doc_ids=window), pos_offset=np.array([10, 0, 5], np.int32))
    positions = doc_positions(state, jnp.array(doc_ids.reshape(3, 2, 3).swapaxes(0, 1)))  # two blocks of three
    np.testing.assert_array_equal(
        np.swapaxes(positions, 0, 1).reshape(3, 6), [[10, 11, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]
    )


DROPOUTS = ["p_dropemb", "p_dropsin", "p_dropres", "p_droplyr"]
DROPPING = small_config(n_layer=1, head_type="mqa")


@functools.cache
def without_dropout():
    inputs = random_tokens()
    return run(DROPPING, inputs, np.zeros_like(inputs))


@pytest.mark.slow(1)
def test_no_dropout_acts_in_evaluation():
    inputs, rates = random_tokens(), dict.fromkeys(DROPOUTS, 0.5)
    evaluated = run(DROPPING.replace(**rates), inputs, np.zeros_like(inputs))
    np.testing.assert_allclose(evaluated, without_dropout(), atol=1e-6)


@pytest.mark.parametrize("name", [slow(name) for name in DROPOUTS])
def test_each_dropout_acts_in_training(name):
    inputs = random_tokens()
    trained = run(DROPPING.replace(is_train=True, **{name: 0.5}), inputs, np.zeros_like(inputs))
    assert np.abs(trained - without_dropout()).max() > 1e-3


@pytest.mark.slow
def test_layerdrop_skips_whole_units_for_whole_streams():
    config = small_config(is_train=True, p_droplyr=0.5, n_layer=1, e_norm=False)
    rows = 32
    tokens = np.repeat(random_tokens(), rows, axis=0)  # equal streams: they differ only by what was skipped
    logits = run(config, tokens, np.zeros_like(tokens))
    kinds = {tuple(np.round(row[[0, 10, 20], 0], 3)) for row in logits}
    assert len(kinds) == 4  # two units, each there or not


@functools.cache
def gradients(config):
    """Of the loss by the parameters, with dropout, for two documents."""
    inputs, targets = random_tokens(seed=1), random_tokens(seed=2)
    doc_ids = np.array([[0] * 9 + [1] * 15], np.int32)

    def loss(params):
        state = Transformer.initial_state(config, 1)
        model = Transformer(config)
        applied = model.apply({"params": params}, state, inputs, doc_ids, None, targets, rngs=rngs_fixture())
        _, out = cast(tuple[dict, dict], applied)
        return jnp.sum(out["losses"]) + out["l_commit"] + out["l_codebook"]

    return jax.jit(jax.grad(loss))(model_params(config))


TRAINING = small_config(is_train=True, p_dropres=0.3, pe_abs=True, block_len=8)


@pytest.mark.parametrize(
    "changes",
    [
        slow(dict(remat="projections")),
        slow(dict(remat="dots", unroll=2)),
        slow(dict(remat="full")),
        slow(dict(remat="full", head_type="mha", attn_type="full")),
    ],
    ids=str,
)
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(changes):
    config = TRAINING.replace(**changes)
    kept = gradients(config.replace(remat="none", unroll=1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), kept, gradients(config))


@pytest.mark.slow
def test_absolute_positions_have_a_learned_scale():
    assert model_params(TRAINING)["pe_scale"].shape == ()
    assert abs(gradients(TRAINING)["pe_scale"]) > 1e-3


@pytest.mark.slow(2)
@pytest.mark.parametrize("n_vocab", [8, 11])  # at most d_model: at once; above: block by block
def test_losses_are_the_cross_entropy_of_the_logits(n_vocab):
    config = small_config(n_vocab=n_vocab, e_scale=0.7, n_layer=1, head_type="mqa")
    inputs, targets = random_tokens(2) % n_vocab, random_tokens(2, seed=1) % n_vocab
    logits = run(config, inputs, np.zeros_like(inputs))
    state = Transformer.initial_state(config, 2)
    apply = jax.jit(lambda *args: Transformer(config).apply({"params": model_params(config)}, *args)[1])
    losses = apply(state, inputs, np.zeros_like(inputs), None, targets)["losses"]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(axis=-1)) - np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.slow
def test_no_array_holds_all_logits_of_a_large_vocabulary():
    config = small_config(n_vocab=1000, remat="projections", is_train=True, n_layer=1, head_type="mqa")
    tokens = random_tokens()

    def loss(params):
        state = Transformer.initial_state(config, 1)
        applied = Transformer(config).apply({"params": params}, state, tokens, tokens * 0, None, tokens)
        return jnp.sum(cast(tuple[dict, dict], applied)[1]["losses"])

    text = jax.jit(jax.value_and_grad(loss)).lower(model_params(config)).compile().as_text() or ""
    rows = {math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+),1000\]", text)}
    assert config.block_len in rows  # a block's
    assert max(rows) <= max(config.block_len, config.d_model) < TOTAL  # the output matrix has d_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_vocabularies_are_looked_up_exactly(dtype):
    table = jax.random.normal(jax.random.key(0), [7, 8]).astype(dtype)
    ids = np.array([[3, 0, 6], [6, 6, 1]], np.int32)
    np.testing.assert_array_equal(jax.jit(embed)(ids, table), np.asarray(table)[ids])


@pytest.mark.slow(1)
def test_layers_of_every_head_type_have_about_as_many_parameters():
    @functools.cache
    def size(config):
        tokens = jnp.zeros([1, config.block_len], jnp.int32)
        init = jax.eval_shape(
            Transformer(config).init, jax.random.key(0), Transformer.initial_state(config, 1), tokens, tokens
        )
        leaves = jax.tree_util.tree_leaves_with_path(init["params"]["layers"])
        return sum(leaf.size for path, leaf in leaves if not is_codebook(path))

    gated = TransformerConfig(d_model=768, d_k=128, d_v=1536, n_layer=1)
    for head_type in ("mqa", "mha"):
        for n_head, d_v in ((6, 128), (1, 1536)):
            other = gated.replace(head_type=head_type, n_head=n_head, d_v=d_v)
            assert size(other) == pytest.approx(size(gated), rel=0.02), other


def test_codebooks_and_vectors_are_told_apart_from_matrices():
    config = small_config(pe_abs=True)
    names = {
        "/".join(key.key for key in path): (is_codebook(path), is_vector(path))
        for path, _ in jax.tree_util.tree_leaves_with_path(model_params(config))
    }
    assert names["layers/unit0/quantizer/codebook"][0]
    assert names["layers/unit1/quantizer/count"][0]
    matrices = {name for name, (codebook, vector) in names.items() if not codebook and not vector}
    unit = {f"layers/unit{i}/w_{w}/kernel" for i in range(2) for w in "qkvgr"}
    assert matrices == unit | {"embedding", "w_out", "layers/unit0/w_o/kernel", "layers/unit1/w_o/kernel"}
