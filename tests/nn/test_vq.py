"""The quantizer: nearest codes, straight-through gradients, and codes that follow the mean of their keys."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.common import small_config
from tvq_pod.nn.codebook import MIN_COUNT, ema_update
from tvq_pod.nn.types import VQSpec
from tvq_pod.nn.vq import VectorQuantizer, nearest_code

N_HEAD, N_CODE, WIDTH, ROWS, LENGTH, GAMMA = 2, 5, 6, 8, 7, 0.9
CONFIG = small_config(n_head=N_HEAD, n_code=N_CODE, d_k=WIDTH)


def random_params() -> dict:
    rng = np.random.default_rng(0)
    return dict(
        codebook=rng.normal(size=[N_HEAD, N_CODE, WIDTH]).astype(np.float32),
        count=rng.uniform(0.5, 3.0, size=[N_HEAD, N_CODE]).astype(np.float32),
    )


def random_keys():
    return np.random.default_rng(1).normal(size=[ROWS, N_HEAD, LENGTH, WIDTH]).astype(np.float32)


def random_mask():
    return (np.random.default_rng(2).uniform(size=[ROWS, LENGTH]) < 0.7).astype(np.float32)


def numpy_ema(params, keys, mask):
    """The moving average, key by key."""
    codebook, count = params["codebook"].astype(np.float64), params["count"].astype(np.float64)
    new_codebook, new_count = codebook.copy(), count.copy()
    for h in range(N_HEAD):
        chosen = [[] for _ in range(N_CODE)]
        for b in range(ROWS):
            for t in range(LENGTH):
                if mask[b, t]:
                    distances = [np.sum((keys[b, h, t] - code) ** 2) for code in codebook[h]]
                    chosen[int(np.argmin(distances))].append(keys[b, h, t].astype(np.float64))
        for s in range(N_CODE):
            new_count[h, s] = GAMMA * count[h, s] + (1 - GAMMA) * len(chosen[s])
            key_sum = np.sum(chosen[s], axis=0) if chosen[s] else 0.0
            new_codebook[h, s] = (GAMMA * count[h, s] * codebook[h, s] + (1 - GAMMA) * key_sum) / new_count[h, s]
    return dict(codebook=new_codebook, count=new_count)


def quantize(params, keys, mask) -> dict:
    """What the quantizer returns; mask: float32 [B, T], or None."""
    spec = None if mask is None else VQSpec(loss_mask=jnp.asarray(mask))
    return cast(dict, VectorQuantizer(CONFIG).apply({"params": params}, keys, spec))


@jax.jit
def one_update(params, keys, mask):
    def l_codebook(params):
        return quantize(params, keys, mask)["l_codebook"]

    return optax.apply_updates(params, ema_update(params, jax.grad(l_codebook)(params), GAMMA))


@pytest.mark.parametrize("n_devices", [1, 8])
def test_codes_follow_the_mean_of_their_keys_on_any_mesh(n_devices, eight_devices):
    mesh = Mesh(np.array(eight_devices[:n_devices]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    keys, mask = jax.device_put((random_keys(), random_mask()), rows)
    params = jax.device_put(random_params(), NamedSharding(mesh, PartitionSpec()))
    assert len(keys.sharding.device_set) == n_devices
    expected = numpy_ema(random_params(), random_keys(), random_mask())
    updated = one_update(params, keys, mask)
    np.testing.assert_allclose(updated["codebook"], expected["codebook"], atol=1e-5)
    np.testing.assert_allclose(updated["count"], expected["count"], rtol=1e-6)


def test_a_code_that_nothing_chose_keeps_its_place_exactly_and_for_ever():
    params = random_params()
    start = params["codebook"].copy()
    keys = np.broadcast_to(start[None, :, None, 0], [ROWS, N_HEAD, LENGTH, WIDTH])  # all keys sit on code 0
    step = jax.jit(lambda params, sums: optax.apply_updates(params, ema_update(params, sums, gamma=0.5)))
    sums = dict(codebook=np.zeros_like(start), count=np.zeros_like(params["count"]))
    for h in range(N_HEAD):
        z = np.asarray(nearest_code(jnp.array(keys), jnp.array(start)))
        assert (z == 0).all()
        sums["codebook"][h, 0], sums["count"][h, 0] = start[h, 0] * ROWS * LENGTH, ROWS * LENGTH
    for _ in range(300):  # 0.5 ** 300 is 0 in float32
        params = step(params, sums)
    np.testing.assert_array_equal(params["codebook"][:, 1:], start[:, 1:])
    assert (np.asarray(params["count"][:, 1:]) == np.float32(MIN_COUNT)).all()
    assert np.isfinite(params["codebook"]).all()


@pytest.mark.slow(2)
def test_shortcodes_are_the_nearest_codes_and_the_value_is_exactly_the_code():
    params, keys = random_params(), random_keys()
    out = quantize(params, keys, None)
    for b, h, t in np.ndindex(ROWS, N_HEAD, LENGTH):
        distances = [np.sum((keys[b, h, t] - code) ** 2) for code in params["codebook"][h]]
        nearest = int(np.argmin(distances))
        assert out["shortcodes"][b, h, t] == nearest
        np.testing.assert_array_equal(out["quantized"][b, h, t], params["codebook"][h, nearest])


@pytest.mark.slow(1)
def test_gradients_go_straight_through_to_keys_and_never_to_codes():
    def value(params, keys):
        return jnp.sum(jnp.sin(quantize(params, keys, None)["quantized"]))

    params, keys = random_params(), random_keys()
    by_params, by_keys = jax.grad(value, argnums=(0, 1))(params, keys)
    quantized = quantize(params, keys, None)["quantized"]
    np.testing.assert_allclose(by_keys, jnp.cos(quantized), atol=1e-6)
    assert not np.asarray(by_params["codebook"]).any()


def test_the_commit_loss_pulls_keys_towards_their_codes():
    params, keys, mask = random_params(), random_keys(), random_mask()

    def commit(keys):
        out = quantize(params, keys, mask)
        return out["l_commit"], out["quantized"]

    (value, quantized), grad = jax.value_and_grad(commit, has_aux=True)(keys)
    n = mask.sum() * N_HEAD
    errors = (keys - np.asarray(quantized)) * mask[:, None, :, None]
    np.testing.assert_allclose(value, np.sum(errors**2) / n, rtol=1e-5)
    np.testing.assert_allclose(grad, 2 * errors / n, atol=1e-6)


def test_perplexity_and_usage_of_codes():
    params = random_params()
    codebook = params["codebook"]
    keys = np.stack([codebook[:, [0, 0, 1, 1]]])  # [1, H, 4, K]: two codes, each twice
    metrics = quantize(params, keys, None)["metrics"]
    np.testing.assert_allclose(metrics["code_perplexity"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["code_usage"], 2 / N_CODE, rtol=1e-6)
