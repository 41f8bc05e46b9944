"""Quadratic attention: exactly the softmax over all keys of the update and the window before it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import model_params, random_qkv, small_config
from tvq_pod.nn.attn import VQAttention
from tvq_pod.nn.full import full_attention
from tvq_pod.nn.model import Transformer

T = 24


def oracle(config, biases, q, recent):
    """In float64, query by query."""
    k, v, ids = (np.asarray(recent[name], np.float64) for name in ("k_hat", "v", "doc_ids"))
    u, pos_v, r = (np.asarray(biases[name], np.float64) for name in ("u", "v", "r"))
    out = np.zeros([*q.shape[:3], v.shape[-1]])
    for b, h, i in itertools.product(*(range(n) for n in q.shape[:3])):
        at = config.mem_len + i
        seen = [j for j in range(at + 1) if ids[b, j] == ids[b, at]]
        scores = np.array([(q[b, h, i] + u[h]) @ k[b, h, j] for j in seen])
        near = {d: (q[b, h, i] + pos_v[h]) @ r[h, d] + config.window_bias for d in range(config.mem_len + 1)}
        scores += [near.get(at - j, 0.0) for j in seen]
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights @ v[b, h, seen] / weights.sum()
    return out


@pytest.mark.slow(2)
@pytest.mark.parametrize(("block_len", "mem_len"), [(1, 3), (4, 6), (8, 2), (24, 5)])
def test_it_is_the_softmax_over_all_that_came_before(block_len, mem_len):
    config = small_config(attn_type="full", block_len=block_len, mem_len=mem_len, window_bias=1.5)
    arrays = random_qkv(config, 2, mem_len + T)
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 3, size=[2, mem_len + T]), axis=1).astype(np.int32)
    recent = dict(k_hat=arrays["k"], v=arrays["v"], doc_ids=ids)
    biases = {name: rng.normal(size=[2, config.d_k]).astype(np.float32) for name in "uv"}
    biases["r"] = rng.normal(size=[2, mem_len + 1, config.d_k]).astype(np.float32)
    q = np.asarray(arrays["q"][:, :, mem_len:])

    @jax.jit
    def attention(q, recent, biases):
        blocks = jnp.moveaxis(q.reshape(2, 2, 1, -1, block_len, config.d_k), 3, 0)  # [R, B, H, 1, L, K]
        with_u, with_v = (blocks + biases[name][None, None, :, None, None] for name in "uv")
        out = full_attention(with_u, with_v, biases["r"], recent, config)
        return jnp.moveaxis(out[:, :, :, 0], 0, 2).reshape(2, 2, T, -1)

    out = attention(q, recent, biases)
    np.testing.assert_allclose(out, oracle(config, biases, q, recent), atol=2e-5)


@functools.cache
def model(config):
    params = model_params(config)
    return params, jax.jit(lambda state, tokens, ids: Transformer(config).apply({"params": params}, state, tokens, ids))


def test_the_model_has_no_codes_and_documents_do_not_meet():
    config = small_config(attn_type="full", block_len=4, mem_len=3, n_layer=1)
    params, apply = model(config)
    assert "quantizer" not in params["layers"]["unit0"]
    assert jax.tree.structure(Transformer.state_axes(config), is_leaf=lambda x: isinstance(x, tuple)) == (
        jax.tree.structure(Transformer.initial_state(config, 1))
    )
    tokens = np.random.default_rng(0).integers(0, 11, size=[1, T]).astype(np.int32)
    ids = np.array([[0] * 9 + [1] * 15], np.int32)
    state, out = apply(Transformer.initial_state(config, 1), tokens, ids)
    alone = np.zeros_like(tokens)
    alone[0, :15] = tokens[0, 9:]
    _, expected = apply(Transformer.initial_state(config, 1), alone, np.zeros_like(ids))
    np.testing.assert_allclose(out["logits"][0, 9:], expected["logits"][0, :15], atol=1e-4)
    np.testing.assert_array_equal(state["unit0"]["pos_offset"], [[15]])


@pytest.mark.slow
def test_the_window_is_carried_to_the_next_update():
    config = small_config(attn_type="full", block_len=4, mem_len=6, n_layer=1)
    _, apply = model(config)
    tokens = np.random.default_rng(0).integers(0, 11, size=[1, T]).astype(np.int32)
    ids = np.zeros([1, 4], np.int32)
    state = VQAttention.initial_state(config, 1)
    assert set(state) == {"pos_offset", "xlcache"}
    carried = Transformer.initial_state(config, 1)
    for begin in range(0, T - 4, 4):
        carried, _ = apply(carried, tokens[:, begin : begin + 4], ids)
    _, with_window = apply(carried, tokens[:, -4:], ids)
    _, without = apply(Transformer.initial_state(config, 1), tokens[:, -4:], ids)
    assert np.abs(with_window["logits"] - without["logits"]).max() > 1e-3
