"""The optimizers, the schedule, clipping, decay, and that none of them touches a codebook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_pod.config import OptimizerSettings
from tvq_pod.optim import make_optimizer, schedule

BASE = dict(learning_rate=0.5, schedule="linear", final_fraction=1.0, warmup_steps=0, clip_norm=0.0)


def tree(seed):
    rng = np.random.default_rng(seed)
    return dict(
        w=dict(kernel=jnp.array(rng.normal(size=[4, 3]), jnp.float32)),
        norm=dict(scale=jnp.array(rng.normal(size=[4]), jnp.float32)),
        quantizer=dict(codebook=jnp.array(rng.normal(size=[1, 5, 2]), jnp.float32), count=jnp.ones([1, 5])),
    )


def one_step(**settings):
    params, grads = tree(0), tree(1)
    optimizer = make_optimizer(OptimizerSettings(**(BASE | settings)), num_steps=10)
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    return params, grads, updates, state


def test_adamw_is_the_papers_equation():
    params, grads, updates, _ = one_step(name="adamw", b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1)
    for module, leaf, decay in (("w", "kernel", 0.1), ("norm", "scale", 0.0)):
        g, w = np.asarray(grads[module][leaf]), np.asarray(params[module][leaf])
        m, v = (1 - 0.8) * g / (1 - 0.8), (1 - 0.9) * g**2 / (1 - 0.9)
        expected = -(0.5 * m / (np.sqrt(v) + 1e-3) + decay * w)
        np.testing.assert_allclose(updates[module][leaf], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_decay_is_not_scaled_by_the_optimizer_and_spares_vectors(name):
    params, _, plain, _ = one_step(name=name)
    _, _, decayed, _ = one_step(name=name, weight_decay=0.01)
    np.testing.assert_allclose(decayed["w"]["kernel"] - plain["w"]["kernel"], -0.01 * params["w"]["kernel"], atol=1e-6)
    np.testing.assert_array_equal(decayed["norm"]["scale"], plain["norm"]["scale"])


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_optimizers_descend_and_keep_no_state_of_codebooks(name):
    _, grads, updates, state = one_step(name=name)
    assert jnp.sum(grads["w"]["kernel"] * updates["w"]["kernel"]) < 0
    assert np.abs(updates["w"]["kernel"]).max() <= 3 * 0.5 + 1e-5  # steps of the size of the learning rate
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("quantizer" in path for path in paths)


def test_lion_moves_by_the_sign():
    _, grads, updates, _ = one_step(name="lion")
    np.testing.assert_allclose(updates["w"]["kernel"], -0.5 * np.sign(grads["w"]["kernel"]), rtol=1e-6)


def test_clipping_is_by_the_norm_of_the_weights_alone():
    """A codebook's sums are large; they must not shrink the weights' gradients."""
    _, grads, updates, _ = one_step(name="lion", b1=0.0, clip_norm=1e-3, learning_rate=1.0)
    del updates
    optimizer = make_optimizer(OptimizerSettings(**(BASE | dict(name="adamw", clip_norm=1.0, eps=1.0))), 10)
    huge = grads | dict(quantizer=jax.tree.map(lambda x: x * 1e6, grads["quantizer"]))
    state = optimizer.init(grads)
    with_sums, _ = optimizer.update(huge, state, grads)
    without, _ = optimizer.update(grads, state, grads)
    np.testing.assert_array_equal(with_sums["w"]["kernel"], without["w"]["kernel"])
    norm = np.sqrt(sum(np.sum(np.square(grads[m][leaf])) for m, leaf in (("w", "kernel"), ("norm", "scale"))))
    g = np.asarray(grads["w"]["kernel"]) / norm
    np.testing.assert_allclose(with_sums["w"]["kernel"], -0.5 * g / (np.abs(g) + 1.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1]),
        ("inverse_sqrt", [0.25, 0.5, 0.75, 1.0, 1.0, np.sqrt(4 / 14), np.sqrt(4 / 24)]),
    ],
)
def test_schedules_warm_up_and_fall(name, expected):
    share = schedule(OptimizerSettings(schedule=name, warmup_steps=4, final_fraction=0.1), num_steps=24)
    np.testing.assert_allclose([share(step) for step in (0, 1, 2, 3, 4, 14, 24)], expected, rtol=1e-5)


def test_a_schedule_needs_no_warm_up():
    share = schedule(OptimizerSettings(schedule="cosine", warmup_steps=0, final_fraction=0.0), num_steps=10)
    np.testing.assert_allclose([share(0), share(5), share(10)], [1.0, 0.5, 0.0], atol=1e-6)
