"""Muon, against Newton-Schulz iterations in numpy and float64 and against the singular value decomposition."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvq_pod.config.settings import MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.planning.cost import local_bytes
from tvq_pod.training.optimizer import make_optimizer
from tvq_pod.training.step import abstract_train_state

SETTINGS = OptimizerSettings(
    name="muon", learning_rate=0.5, schedule="constant", warmup_steps=0, clip_norm=0.0, b1=0.8, b2=0.9, eps=1e-4,
    momentum=0.75,
)  # fmt: skip
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan's quintic
N_LAYER, STEPS = 2, 3


def tree(seed: int) -> dict:
    """Kernels that are wide, tall and of one head, of layers that differ by a factor of 100; and what is no kernel."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale: float | np.ndarray = 1.0):
        return jnp.array(rng.normal(size=shape) * scale, jnp.float32)

    def kernel(*shape):
        return dict(kernel=draw(N_LAYER, *shape, scale=np.array([1.0, 100.0]).reshape(2, 1, 1, 1)))

    unit = dict(w_q=kernel(3, 4, 30), w_o=kernel(3, 8, 10), w_up=kernel(1, 12, 8), norm=dict(scale=draw(N_LAYER, 10)))
    unit["quantizer"] = dict(codebook=draw(N_LAYER, 1, 5, 2), count=jnp.ones([N_LAYER, 1, 5]))
    return dict(embedding=draw(7, 10), w_out=draw(10, 7), layers=dict(unit0=unit))


def moved(settings: OptimizerSettings, params: dict, gradients: list) -> dict:
    """What the last of some steps adds to the parameters; they stay as they are."""
    optimizer = make_optimizer(settings, 10, 0.9)
    state, update, updates = optimizer.init(params), jax.jit(optimizer.update), None
    for grads in gradients:
        updates, state = update(grads, state, params)
    return cast(dict, updates)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five of Jordan's iterations of a matrix, the slow way."""
    a, b, c = COEFFICIENTS
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def nesterov(gradients: list) -> np.ndarray:
    """The momentum after these gradients, with the look ahead, as optax.contrib.muon corrects its bias."""
    beta, m = SETTINGS.momentum, np.zeros_like(gradients[0])
    for g in gradients:
        m = beta * m + (1 - beta) * g
    t = len(gradients)
    return beta * m / (1 - beta ** (t + 1)) + (1 - beta) * gradients[-1] / (1 - beta**t)


def adam(gradients: list) -> np.ndarray:
    m = v = np.zeros_like(gradients[0])
    for g in gradients:
        m, v = SETTINGS.b1 * m + (1 - SETTINGS.b1) * g, SETTINGS.b2 * v + (1 - SETTINGS.b2) * g**2
    t = len(gradients)
    return m / (1 - SETTINGS.b1**t) / (np.sqrt(v / (1 - SETTINGS.b2**t)) + SETTINGS.eps)


@pytest.fixture(scope="module")
def three_steps() -> tuple[dict, list[dict]]:
    """What the third of three steps adds, by path, and the gradients of each."""
    gradients = [tree(seed) for seed in range(1, STEPS + 1)]
    leaves = jax.tree_util.tree_leaves_with_path
    updates = leaves(moved(SETTINGS, tree(0), gradients))
    return dict(updates), [{path: np.float64(leaf) for path, leaf in leaves(grads)} for grads in gradients]


def test_each_layer_s_kernel_is_one_matrix_that_newton_schulz_made_orthogonal(three_steps):
    updates, gradients = three_steps
    n_kernels = 0
    for path, update in updates.items():
        if path[-1].key != "kernel":
            continue
        for layer in range(N_LAYER):
            own = [g[path][layer].reshape(-1, update.shape[-1]) for g in gradients]
            expected = newton_schulz(nesterov(own)) * 0.2 * max(own[0].shape) ** 0.5
            found = update[layer].reshape(own[0].shape)
            np.testing.assert_allclose(found, -SETTINGS.learning_rate * expected, rtol=1e-3, atol=1e-4)
            n_kernels += 1
    assert n_kernels == 3 * N_LAYER


def test_its_singular_values_are_about_1_and_its_singular_vectors_those_of_the_momentum(three_steps):
    updates, gradients = three_steps
    for path, update in updates.items():
        if path[-1].key != "kernel":
            continue
        for layer in range(N_LAYER):
            own = [g[path][layer].reshape(-1, update.shape[-1]) for g in gradients]
            u, _, vt = np.linalg.svd(nesterov(own), full_matrices=False)
            found = np.float64(update[layer]).reshape(own[0].shape)
            core = u.T @ found @ vt.T / (-SETTINGS.learning_rate * 0.2 * max(own[0].shape) ** 0.5)
            values = np.diag(core)
            np.testing.assert_allclose(core, np.diag(values), atol=1e-3)
            assert 0.5 < values.min() <= values.max() < 1.3
            rms = np.sqrt(np.mean(found**2))  # as that of AdamW's steps, whatever the shape
            assert 0.6 * 0.2 < rms / SETTINGS.learning_rate < 1.3 * 0.2


def test_the_embedding_the_output_and_vectors_follow_adam(three_steps):
    updates, gradients = three_steps
    others = [path for path in updates if path[-1].key in ("embedding", "w_out", "scale")]
    assert len(others) == 3
    for path in others:
        expected = -SETTINGS.learning_rate * adam([g[path] for g in gradients])
        np.testing.assert_allclose(updates[path], expected, rtol=1e-4, atol=1e-5)


MODEL = TransformerConfig(head_type="mha", n_head=4, d_model=64, d_k=16, d_v=16, n_code=4, n_layer=2, n_vocab=128)


def on_mesh(devices, **sizes):
    """Settings, and the abstract state on a mesh."""
    settings = Settings(model=MODEL, train=TrainSettings(batch_size=8), optimizer=SETTINGS, mesh=MeshSettings(**sizes))
    return settings, abstract_train_state(settings, make_mesh(settings.mesh, devices))


def test_momentum_and_moments_lie_on_the_mesh_as_their_parameters_do(eight_devices):
    _, state = on_mesh(eight_devices, data=4, model=2)
    where = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        name = jax.tree_util.keystr(path)
        for param, like in where.items():
            if name.endswith(param):
                assert (leaf.shape, leaf.sharding) == (like.shape, like.sharding), name
                assert leaf.dtype == jnp.float32
                found.setdefault(param, []).append(name)
    counts = {param: len(names) for param, names in found.items()}
    weights = {param for param in where if "quantizer" not in param}
    assert counts == {param: 1 if "kernel" in param else 2 for param in weights}  # momentum; Adam's two moments
    # so plan counts it: a device holds an eighth of the kernels' momentum
    held = local_bytes(state.opt_state)
    kernels = sum(leaf.size for param, leaf in where.items() if "kernel" in param)
    others = sum(leaf.size for param, leaf in where.items() if param in weights and "kernel" not in param)
    assert kernels * 4 / 8 <= held <= kernels * 4 / 8 + others * 8


def normal_like(abstract: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(rng.normal(size=x.shape), np.float32), x.sharding), abstract
    )


@pytest.mark.slow
def test_over_a_mesh_it_moves_what_it_moves_on_one_device(eight_devices):
    results = []
    for devices, sizes in ((eight_devices[:1], dict(data=1)), (eight_devices, dict(data=4, model=2))):
        settings, abstract = on_mesh(devices, **sizes)
        optimizer = make_optimizer(settings.optimizer, 10, 0.9)
        params, grads = (normal_like(abstract.params, seed) for seed in range(2))
        shardings = jax.tree.map(lambda x: x.sharding, (abstract.params, abstract.opt_state))
        state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
        updates, _ = jax.jit(optimizer.update, out_shardings=shardings)(grads, state, params)
        results.append(jax.device_get(updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *results)
    assert optax.tree.norm(results[0]) > 1.0
