"""Dropout: its masks are as random as they must be, and the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.common import small_config
from tvq_pod.nn.layers import Dropout, RMSNorm, inverse_rms, random_bits

SHAPE = (4, 8, 64, 96)
bits_of = jax.jit(random_bits, static_argnums=1)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_share_is_dropped_and_the_mean_is_kept(rate):
    dropout = Dropout(rate, "ephemeral", is_train=True)
    y = np.asarray(dropout.apply({}, jnp.ones(SHAPE), rngs=dict(ephemeral=jax.random.key(0))))
    n, dropped = y.size, (y == 0).mean()
    assert abs(dropped - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


def test_bits_of_neighbours_and_of_other_keys_have_nothing_in_common():
    words = np.asarray(bits_of(jax.random.key(0), SHAPE))
    bits = np.unpackbits(words.reshape(-1).view(np.uint8)).reshape(*SHAPE, 32).astype(np.float32) - 0.5
    bound = 5 / np.sqrt(bits.size) * 2  # five standard errors of a correlation, halved twice
    assert np.abs(bits.mean(axis=(0, 1, 2, 3))).max() < 5 * 0.5 / np.sqrt(words.size)  # every bit is fair
    for axis in range(4):
        ahead, behind = (np.take(bits, range(*part), axis=axis) for part in ((1, SHAPE[axis]), (0, SHAPE[axis] - 1)))
        assert abs((ahead * behind).mean()) / 0.25 < bound
    for n in (1, 2, 3):
        other = np.asarray(bits_of(jax.random.key(n), SHAPE))
        differing = np.unpackbits((words ^ other).reshape(-1).view(np.uint8)).mean()
        assert abs(differing - 0.5) < 5 * 0.5 / np.sqrt(bits.size)
    # no row is another row, shifted or not, whatever the bits were mixed from
    assert len(np.unique(words)) > words.size * 0.9999


def test_more_elements_than_a_word_counts_are_no_obstacle():
    """The residual stream of 4,096 chips: 2 ** 35 elements. Nothing is computed here but shapes."""
    shape = (4, 8192, 512, 2048)
    assert jax.eval_shape(lambda key: random_bits(key, shape), jax.random.key(0)).shape == shape


def test_a_mask_is_the_same_on_any_mesh(eight_devices):
    mesh = Mesh(np.array(eight_devices).reshape(2, 4), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    split = jax.jit(random_bits, static_argnums=1, out_shardings=sharding)(jax.random.key(3), SHAPE)
    assert len(split.sharding.device_set) == 8
    np.testing.assert_array_equal(split, bits_of(jax.random.key(3), SHAPE))


def test_per_stream_draws_one_number_for_each_row():
    dropout = Dropout(0.5, "timeless", is_train=True, per_stream=True)
    y = np.asarray(dropout.apply({}, jnp.ones([3, 64, 5, 7]), rngs=dict(timeless=jax.random.key(0))))
    per_row = y.transpose(1, 0, 2, 3).reshape(64, -1)
    assert (per_row == per_row[:, :1]).all()
    assert 10 < (per_row[:, 0] == 0).sum() < 54


def test_a_norm_that_is_given_its_scale_has_the_same_gradient():
    """By x and by the gain, though the scale comes as a constant."""
    norm, x = RMSNorm(small_config(), use_scale=True), jax.random.normal(jax.random.key(0), (3, 5))
    params = dict(params=dict(scale=jnp.linspace(0.5, 2.0, 5)))

    def loss(params, x, inverse):
        return jnp.sum(jnp.sin(norm.apply(params, x, inverse)))

    expected = jax.value_and_grad(loss, (0, 1))(params, x, None)
    found = jax.value_and_grad(loss, (0, 1))(params, x, inverse_rms(x))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
