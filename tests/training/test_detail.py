"""Norms by layer, against NumPy; the steps between them do not compute them, and no step is changed by them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.made_up import first_state
from tests.run.saved import SETTINGS, a_batch
from tvq_pod.config.settings import MeshSettings
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.training.detail import at_some_steps, detail
from tvq_pod.training.step import make_train_step


def trees() -> tuple[dict, dict, dict]:
    """Made-up gradients, weights and updates, of three layers."""
    rng = np.random.default_rng(0)

    def tree(scale):
        def draw(*shape):
            return (scale * rng.normal(size=shape)).astype(np.float32)

        quantizer = dict(codebook=draw(3, 1, 5, 2), count=draw(3, 1, 5))
        unit = dict(w_q=dict(kernel=draw(3, 2, 4, 6)), norm=dict(scale=draw(3, 6)), quantizer=quantizer)
        return dict(layers=dict(unit0=unit, unit1=dict(w=draw(3, 7))), embedding=draw(11, 6))

    return tree(1.0), tree(10.0), tree(0.1)


def norms(tree) -> dict:
    """By NumPy: a layer's norm is that of all its weights laid end to end."""
    unit0, unit1 = tree["layers"]["unit0"], tree["layers"]["unit1"]
    weights = unit0["w_q"]["kernel"], unit0["norm"]["scale"], unit1["w"]
    layers = [np.linalg.norm(np.concatenate([w[n].ravel() for w in weights])) for n in range(3)]
    return dict(layers=np.array(layers), embedding=np.linalg.norm(tree["embedding"]))


def test_norms_are_of_each_layer_and_of_what_is_in_none():
    grads, params, updates = trees()
    found = detail(grads, params, updates)
    expected = {f"grad_norm_{name}": norm for name, norm in norms(grads).items()}
    expected |= {f"param_norm_{name}": norm for name, norm in norms(params).items()}
    expected |= {f"update_ratio_{name}": norm / norms(params)[name] for name, norm in norms(updates).items()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_a_weight_that_is_zero_has_a_ratio():
    grads, params, updates = (jax.tree.map(np.zeros_like, tree) for tree in trees())
    assert not any(np.any(value) for value in detail(grads, params, updates).values())


def test_only_every_so_manieth_step_computes_them():
    compute = jax.jit(lambda step: at_some_steps(step, 3, lambda: dict(norm=jnp.ones(2))))
    found = [compute(step)["detail"]["norm"].tolist() for step in range(1, 7)]
    assert found == [[0, 0], [0, 0], [1, 1]] * 2
    assert at_some_steps(jnp.int32(3), 0, lambda: {}) == {}


@functools.cache
def stepped(every_steps: int, n_steps: int = 3):
    """The state after some real steps from the same first one, the state before the last, and all metrics."""
    settings = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, detail_every_steps=every_steps))
    mesh = make_mesh(MeshSettings())
    state, step, metrics, before = first_state(settings, mesh), make_train_step(settings, mesh), [], None
    for seed in range(n_steps):
        before = jax.tree.map(np.asarray, state.params)
        state, found = step(state, a_batch(mesh, seed))
        metrics.append(jax.device_get(found))
    return jax.tree.map(np.asarray, state.params), before, metrics


@pytest.mark.slow
def test_a_real_step_says_what_it_did_to_each_layer_and_trains_as_without():
    params, before, metrics = stepped(3)
    *others, last = [found.pop("detail") for found in metrics]
    assert not any(np.any(value) for found in others for value in found.values())
    kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key != "count"]
    assert kernels
    n_layer = SETTINGS.model.n_layer
    squares = [
        last["grad_norm_layers"] ** 2,
        *(value**2 for name, value in last.items() if name.startswith("grad_norm_") and name != "grad_norm_layers"),
    ]
    assert squares[0].shape == (n_layer,)
    np.testing.assert_allclose(np.sqrt(sum(map(np.sum, squares))), metrics[-1]["grad_norm"], rtol=1e-4)
    embedding = before["embedding"]
    moved = np.linalg.norm(np.float64(params["embedding"]) - embedding) / np.linalg.norm(np.float64(embedding))
    np.testing.assert_allclose(last["param_norm_embedding"], np.linalg.norm(embedding), rtol=1e-5)
    np.testing.assert_allclose(last["update_ratio_embedding"], moved, rtol=1e-2)
    without, _, plain = stepped(0)
    assert "detail" not in plain[-1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, without)
