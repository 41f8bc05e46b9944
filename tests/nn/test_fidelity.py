"""What docs/fidelity.md calls equal to the original Transformer-VQ code, held by NumPy in float64.

The oracle is written from the definitions, with parameters as the original has them: one matrix for keys, values and
gates, one vector for the u of all heads, sums and counts of keys for the codes. One document; a softmax over all of its
quantized keys, with no blocks and no cache. The patches of tests/fidelity.py turn the rest of the package into the
original, so what that study trains is held here too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fidelity
from tests.common import small_config
from tvq_pod.config.settings import Settings
from tvq_pod.nn import attn, model
from tvq_pod.nn.codebook import ema_update
from tvq_pod.nn.model import Transformer
from tvq_pod.training import step

T, UNITS = 12, ("unit0", "unit1")
CONFIG = small_config(n_layer=1, e_scale=0.5)  # two heads, L = M = 4
D, K, V, H, S, N = CONFIG.d_model, CONFIG.d_k, CONFIG.d_v, CONFIG.n_head, CONFIG.n_code, CONFIG.n_vocab


@pytest.fixture
def patched(monkeypatch):
    """Applies patches of tests/fidelity.py, for one test."""
    places = [(attn, "sinusoids"), (attn, "RMSNorm"), (attn.VQAttention, "biases"), (model, "RMSNorm")]
    places += [(model, "token_losses"), (Transformer, "param"), (step, "initial_params")]
    for place, name in places:
        monkeypatch.setattr(place, name, getattr(place, name))  # so it is as before after the test

    def apply(*patches):
        for patch in patches:
            patch()

    return apply


def original_params(seed=0) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return rng.normal(size=shape) * scale

    def unit():
        kernels = dict(q=draw(D, H * K), kvg=draw(D, H * (K + 2 * V)), r=draw(D, H * K), res=draw(H * V, D, scale=0.3))
        vectors = dict(gain=1 + draw(D), bias=draw(D), u=draw(H * K), v=draw(H * K))
        c_count = np.exp(draw(H, S))
        return kernels | vectors | dict(c_count=c_count, c_sum=draw(H, S, K, scale=K**-0.25) * c_count[..., None])

    outer = dict(embedding=draw(N, D), gain=1 + draw(D), bias=draw(D), out=draw(D, N), out_bias=draw(N))
    return outer | dict(units=[unit() for _ in UNITS])


def as_ours(original: dict) -> dict:
    """The same parameters as they lie here."""

    def unit(p):
        w_k, w_v, w_g = np.split(p["kvg"], np.cumsum([H * K, H * V]), axis=1)
        projections = dict(w_q=p["q"], w_k=w_k, w_v=w_v, w_g=w_g, w_r=p["r"])
        return {name: dict(kernel=matrix.T.reshape(H, -1, D)) for name, matrix in projections.items()} | dict(
            w_o=dict(kernel=p["res"].reshape(H, V, D)),
            norm=dict(scale=p["gain"], bias=p["bias"]),
            u=p["u"].reshape(H, K),
            v=p["v"].reshape(H, K),
            quantizer=dict(codebook=p["c_sum"] / p["c_count"][..., None], count=p["c_count"]),
        )

    layer = {name: unit(p) for name, p in zip(UNITS, original["units"], strict=True)}
    params = dict(
        embedding=original["embedding"],
        layers=jax.tree.map(lambda x: x[None], layer),  # a leading axis of n_layer
        norm_out=dict(scale=original["gain"], bias=original["bias"]),
        w_out=original["out"],
        b_out=original["out_bias"],
    )
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


def rms_normed(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def unit_of_original(p, x):
    """What a gated attention unit adds to x [T, D]; and the sum over heads of the squared errors of its keys, [T]."""
    x = rms_normed(x) * p["gain"] + p["bias"]
    k, v, g = np.split(x @ p["kvg"], np.cumsum([H * K, H * V]), axis=1)
    q, k = (rms_normed(y.reshape(T, H, K)) * K**-0.25 for y in (x @ p["q"], k))
    v, g = silu(v).reshape(T, H, V), silu(g)
    codes = p["c_sum"] / p["c_count"][..., None]
    sq_dists = np.sum((k[:, :, None] - codes) ** 2, axis=-1)  # [T, H, S]
    z = np.argmin(sq_dists, axis=-1)
    u, pos_v = (p[name].reshape(H, K) * K**-0.25 for name in "uv")
    out = np.zeros([T, H, V])
    for i in range(T):
        for h in range(H):
            scores = [(q[i, h] + u[h]) @ codes[h, z[j, h]] for j in range(i + 1)]
            for j in range(max(0, i - CONFIG.mem_len), i + 1):
                angles = (i - j) / 100_000 ** (np.arange(0, D, 2) / D)
                r = np.concatenate([np.sin(angles), np.cos(angles)]) @ p["r"]
                scores[j] += (q[i, h] + pos_v[h]) @ r.reshape(H, K)[h] * K**-0.25
            weights = np.exp(np.array(scores) - max(scores))
            out[i, h] = weights @ v[: i + 1, h] / np.sum(weights)
    return (out.reshape(T, H * V) * g) @ p["res"], np.min(sq_dists, axis=-1).sum(axis=1)


def losses_of_original(params: dict, inputs, targets):
    """Cross-entropy [T], and the commit loss: a mean over tokens, a sum over heads and units."""
    x, commit = params["embedding"][inputs], 0.0
    for unit in params["units"]:
        residual, sq_errors = unit_of_original(unit, x)
        x, commit = x + residual, commit + np.mean(sq_errors)
    logits = (rms_normed(x) * params["gain"] + params["bias"]) @ params["out"] + params["out_bias"]
    logits *= CONFIG.e_scale
    return np.log(np.sum(np.exp(logits), axis=-1)) - logits[np.arange(T), targets], commit


@pytest.mark.slow(1)
def test_the_model_is_that_of_the_original(patched):
    """Three blocks in one update, so the window, the cache and the relative biases of both all count."""
    patched(fidelity.sinusoid_table, fidelity.scaled_u_and_v, fidelity.more_biases)
    original = original_params()
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(0, N, size=[2, T])
    arrays = [jnp.array(x[None], jnp.int32) for x in (inputs, np.zeros(T), targets)]

    @jax.jit
    def ours(params, inputs, doc_ids, targets):
        return Transformer(CONFIG).apply(
            {"params": params}, Transformer.initial_state(CONFIG, 1), inputs, doc_ids, targets=targets
        )[1]

    found = ours(as_ours(original), *arrays)
    losses, commit = losses_of_original(original, inputs, targets)
    np.testing.assert_allclose(found["losses"][0], losses, rtol=1e-4)
    np.testing.assert_allclose(found["l_commit"], commit / H, rtol=1e-4)  # a mean over heads here


def test_codes_are_the_originals_quotients_of_sums_while_none_is_dead():
    """There sums and counts of keys have a moving average each, and a code is their quotient."""
    rng, gamma = np.random.default_rng(0), 0.9
    count = np.exp(rng.normal(size=[H, S]))
    sums = rng.normal(size=[H, S, K])
    ours = dict(codebook=jnp.array(sums / count[..., None], jnp.float32), count=jnp.array(count, jnp.float32))
    for _ in range(20):
        n = rng.poisson(0.5, size=[H, S])  # often 0
        keys = rng.normal(size=[H, S, K]) * n[..., None]
        sums, count = gamma * sums + (1 - gamma) * keys, gamma * count + (1 - gamma) * n
        updates = ema_update(ours, dict(codebook=jnp.array(keys), count=jnp.array(n, jnp.float32)), gamma)
        ours = {name: ours[name] + updates[name] for name in ours}
    assert count.min() > 0.01  # the original divides by no less
    np.testing.assert_allclose(ours["codebook"], sums / count[..., None], rtol=1e-3, atol=1e-5)


@pytest.mark.slow(2)
def test_initial_weights_can_be_as_wide_as_the_originals(patched):
    patched(fidelity.initial_codes, fidelity.initial_outputs)
    config = small_config(n_code=64, d_v=64, d_model=64, attention="plain")
    unit = jax.jit(lambda: step.initial_params(Settings(model=config)))()["layers"]["unit0"]
    codebook, output = (np.std(box.unbox()) for box in (unit["quantizer"]["codebook"], unit["w_o"]["kernel"]))
    np.testing.assert_allclose(codebook, (config.n_head * config.n_code) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(output, (config.n_head * config.d_v) ** -0.5, rtol=0.05)
