"""One token at a time, in place, is the ordinary forward pass: for every kind of model, documents and all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import model_params, small_config
from tvq_pod.nn.decode import decode_state, decode_step, decode_weights, decode_while
from tvq_pod.nn.model import Transformer

STEPS, START = 40, 13

KINDS = dict(
    shga=(3, dict(window_bias=2.0, pe_abs=True, temperature="learned")),
    one_head=(1, dict(n_head=1, e_tie=True, e_norm=False, e_scale=0.3, mem_len=1, n_layer=2)),
    mqa=(1, dict(head_type="mqa", mem_len=17, n_head=4)),
    mha=(3, dict(head_type="mha", agg_cache=False)),
    shifted=(3, dict(key_shift=True)),
    shifted_mqa=(2, dict(key_shift=True, head_type="mqa", n_head=4)),
    full=(2, dict(attn_type="full", window_bias=1.0, n_head=1)),
    bfloat16=(2, dict(dtype="bfloat16", n_head=1)),
)


def streams(n_rows, seed=0):
    """tokens and doc_ids, int32 [B, STEPS]: documents of many lengths, and in the first row but one for all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, size=[n_rows, STEPS]).astype(np.int32)
    is_new = rng.random([n_rows, STEPS]) < np.array([0.03, 0.1, 0.4])[:n_rows, None]
    return tokens, np.cumsum(is_new, axis=1).astype(np.int32)


def config_of(kind):
    n_rows, changes = KINDS[kind]
    return n_rows, small_config(block_len=1, mem_len=5, n_layer=1).replace(**changes)


def ordinary(config, tokens, doc_ids):
    """Logits [B, STEPS, n_vocab] of the model by updates of one token; and its state after START of them."""

    @jax.jit
    def apply(params, state, tokens, doc_ids):
        state, out = Transformer(config).apply({"params": params}, state, tokens, doc_ids)
        return state, out["logits"]

    state, logits, kept = Transformer.initial_state(config, len(tokens)), [], {}
    for step in range(STEPS):
        if step == START:
            kept = state
        state, one = apply(model_params(config), state, tokens[:, step : step + 1], doc_ids[:, step : step + 1])
        logits.append(np.asarray(one))
    return np.concatenate(logits, axis=1), kept


def in_a_loop(config, tokens, doc_ids):
    """A compiled function (params, state) -> (state, logits [B, steps, n_vocab]) that updates the state in place."""
    n_rows, n_steps = tokens.shape

    def feed(carry):
        return jnp.asarray(tokens)[:, carry[0]], jnp.asarray(doc_ids)[:, carry[0]]

    def take(carry, logits):
        return carry[0] + 1, carry[1].at[:, carry[0]].set(logits)

    def run(params, state):
        weights = decode_weights(params, config)
        carry = 0, jnp.zeros([n_rows, n_steps, config.n_vocab])
        state, carry = decode_while(lambda carry: carry[0] < n_steps, feed, take, weights, state, carry, config)
        return state, carry[1]

    return jax.jit(run, donate_argnums=1)


start_of = jax.jit(decode_state, static_argnums=(1, 2))


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", ["shga", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])])
def test_one_token_at_a_time_is_the_ordinary_model(kind):
    """From a state in the middle of documents, over the ring's end several times, into new documents."""
    n_rows, config = config_of(kind)
    tokens, doc_ids = streams(n_rows)
    expected, state = ordinary(config, tokens, doc_ids)
    loop = in_a_loop(config, tokens[:, START:], doc_ids[:, START:])
    _, logits = loop(model_params(config), start_of(state, config))
    atol = 0.1 if config.dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(logits, expected[:, START:], atol=atol)


def test_a_loop_is_its_steps():
    n_rows, config = config_of("shga")
    tokens, doc_ids = streams(n_rows)
    weights = jax.jit(decode_weights, static_argnums=1)(model_params(config), config)
    state = start = start_of(Transformer.initial_state(config, n_rows), config)
    step = jax.jit(decode_step, static_argnums=4)
    expected = []
    for n in range(STEPS):
        state, logits = step(weights, state, tokens[:, n], doc_ids[:, n], config)
        expected.append(logits)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)
    last, logits = in_a_loop(config, tokens, doc_ids)(model_params(config), jax.tree.map(jnp.copy, start))
    np.testing.assert_allclose(logits, np.stack(expected, axis=1), atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), last, state)
    assert (state["units"][0]["count"].sum(axis=(1, 2)) > 0).any()


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", ["shga", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])])
def test_rows_may_have_slots_of_their_own(kind):
    """Row n begins n times STAGGER steps later, in the place of a row that ends: each gives what it gives beside rows
    that begin with it, to the last bit."""
    n_rows, config = config_of(kind)
    n_rows, stagger = max(n_rows, 2), 3
    tokens, doc_ids = streams(3)
    tokens, doc_ids = tokens[:n_rows], doc_ids[:n_rows]
    params = model_params(config)
    weights = jax.jit(decode_weights, static_argnums=1)(params, config)
    step = jax.jit(decode_step, static_argnums=4)
    empty = start_of(Transformer.initial_state(config, n_rows), config, True)

    def run(starts):
        state, out = empty, []
        for n in range(STEPS):
            begins = np.array(starts) == n
            state = jax.tree.map(
                lambda new, old, begins=begins: jnp.where(begins.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                empty, state,
            )  # fmt: skip
            place = np.clip(n - np.array(starts), 0, STEPS - 1)
            rows = np.arange(n_rows)
            state, logits = step(weights, state, tokens[rows, place], doc_ids[rows, place], config)
            out.append(np.asarray(logits))
        return [np.stack(out)[start:, row] for row, start in enumerate(starts)]

    together, apart = run([0] * n_rows), run([row * stagger for row in range(n_rows)])
    for row in range(n_rows):
        np.testing.assert_array_equal(apart[row], together[row][: STEPS - row * stagger])
    expected, _ = ordinary(config, tokens, doc_ids)
    atol = 0.1 if config.dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(np.stack(together), expected, atol=atol)


@pytest.mark.slow(2)
@pytest.mark.parametrize("slot_by_row", [False, True])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_loop_copies_no_large_array(n_rows, slot_by_row):
    """Arrays are written where they are: in the compiled loop, nothing of the shape of a ring or a cache is copied."""
    config = small_config(block_len=1, mem_len=6, n_layer=1, d_v=24, n_head=1)
    tokens, doc_ids = streams(n_rows)
    state = jax.eval_shape(lambda: decode_state(Transformer.initial_state(config, n_rows), config, slot_by_row))
    text = in_a_loop(config, tokens, doc_ids).lower(model_params(config), state).compile().as_text() or ""
    rows = "" if n_rows == 1 else f"{n_rows},"
    for shape in (f"f32[{rows}7,24]", f"f32[{rows}5,24]", f"f32[{rows}7,6]"):
        assert shape in text
        assert not [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]
