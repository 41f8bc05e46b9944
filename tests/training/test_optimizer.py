"""The optimizers, the schedules, clipping and decay are those of Transformer-VQ's own code; none touches a codebook.

The oracles are written from its definitions, in numpy and float64; Adafactor's oracle is optax.adafactor itself, given
one array for each of the layers.
"""

import dataclasses
import functools
import importlib
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvq_pod.config.settings import MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.nn.codebook import ema_update, is_codebook
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.planning.hlo import Program
from tvq_pod.training.optimizer import make_optimizer, schedule
from tvq_pod.training.step import abstract_train_state

BASE = OptimizerSettings(learning_rate=0.5, schedule="linear", final_fraction=1.0, warmup_steps=0, clip_norm=0.0)
STEPS, WARMUP, FINAL, GAMMA = 20, 4, 0.1, 0.9
NAMES = ["adamw", "lion", "adafactor", "muon", "nadamw", "sgd"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def tree(seed) -> dict:
    rng = np.random.default_rng(seed)
    return dict(
        w=dict(kernel=jnp.array(rng.normal(size=[1, 4, 3]), jnp.float32)),
        norm=dict(scale=jnp.array(rng.normal(size=[4]), jnp.float32)),
        quantizer=dict(codebook=jnp.array(rng.normal(size=[1, 5, 2]), jnp.float32), count=jnp.ones([1, 5])),
    )


def share_of(name: str, step: int, warmup: int = WARMUP, num_steps: int = STEPS, final: float = FINAL) -> float:
    """The schedule's oracle."""
    if step < warmup:
        return step / warmup
    if name == "inverse_sqrt":
        return (max(warmup, 1) / (max(warmup, 1) + step - warmup)) ** 0.5
    done = min((step - warmup) / (num_steps - warmup), 1.0)
    return final + (1.0 - final) * (1.0 - done if name == "linear" else (1.0 + np.cos(np.pi * done)) / 2)


def weights_of(params) -> dict:
    """The weights that the optimizer moves, in float64."""
    return {"kernel": np.float64(params["w"]["kernel"]), "scale": np.float64(params["norm"]["scale"])}


def gradients_of(tree) -> list:
    """One for each step, of different sizes."""
    return [jax.tree.map(lambda x, size=3.0 ** (i % 5 - 2): x * size, tree(i + 1)) for i in range(STEPS)]


def trained(settings: OptimizerSettings, params: dict, gradients: list) -> dict:
    """The parameters after one step for each of the gradients."""
    optimizer = make_optimizer(settings, STEPS, GAMMA)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return cast(dict, optax.apply_updates(params, updates)), state

    state = optimizer.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params


def adamw_direction(g, memory, t, settings):
    m, v = memory or (0.0, 0.0)
    m, v = settings.b1 * m + (1 - settings.b1) * g, settings.b2 * v + (1 - settings.b2) * g**2
    m_hat, v_hat = m / (1 - settings.b1**t), v / (1 - settings.b2**t)
    return m_hat / (np.sqrt(v_hat) + settings.eps), (m, v)


def nadamw_direction(g, memory, t, settings):
    """Dozat's: the first moment of the step to come, in which this gradient counts once more."""
    m, v = memory or (0.0, 0.0)
    m, v = settings.b1 * m + (1 - settings.b1) * g, settings.b2 * v + (1 - settings.b2) * g**2
    ahead = settings.b1 * m / (1 - settings.b1 ** (t + 1)) + (1 - settings.b1) * g / (1 - settings.b1**t)
    return ahead / (np.sqrt(v / (1 - settings.b2**t)) + settings.eps), (m, v)


def sgd_direction(g, memory, t, settings):
    m = g + settings.momentum * (0.0 if memory is None else memory)
    return m, m


def lion_direction(g, memory, t, settings):
    """Its momentum is kept in bfloat16."""
    m = np.zeros_like(g) if memory is None else memory
    kept = settings.b2 * m + (1 - settings.b2) * g
    return np.sign(settings.b1 * m + (1 - settings.b1) * g), np.float64(kept.astype(jnp.bfloat16))


@pytest.mark.parametrize("schedule_name", ["cosine", slow("linear"), slow("inverse_sqrt")])
@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("adamw", adamw_direction),
        ("lion", lion_direction),
        ("nadamw", nadamw_direction),
        ("sgd", sgd_direction),
    ],
)
def test_twenty_steps_are_those_of_the_original(name, direction, schedule_name):
    """The gradient is clipped first, by the norm of all weights; then comes the optimizer, then the learning rate and
    the schedule; last, a matrix loses a share of itself that nothing scales."""
    settings = OptimizerSettings(
        name=name, learning_rate=0.03, schedule=schedule_name, warmup_steps=WARMUP, final_fraction=FINAL,
        b1=0.25, b2=0.5, eps=1e-3, momentum=0.5, weight_decay=0.02, clip_norm=2.0,
    )  # fmt: skip
    # (powers of two: a momentum in bfloat16 times one of them is exact, so no sign hangs on how products are rounded)
    params, gradients = tree(0), gradients_of(tree)
    expected, memory, clipped = weights_of(params), {}, 0
    for step, grads in enumerate(gradients):
        grads = weights_of(grads)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        clipped += norm > settings.clip_norm
        for leaf, g in grads.items():
            g = g * min(1.0, settings.clip_norm / norm)
            moved, memory[leaf] = direction(g, memory.get(leaf), step + 1, settings)
            lost = settings.weight_decay * expected[leaf] if leaf == "kernel" else 0.0
            expected[leaf] = expected[leaf] - settings.learning_rate * share_of(schedule_name, step) * moved - lost
    assert 0 < clipped < STEPS  # both cases
    found = weights_of(trained(settings, params, gradients))
    for leaf in expected:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-4, atol=1e-5)


# --- Adafactor -------------------------------------------------------------------------------------------------------


def stacked_tree(seed, n_layer=2) -> dict:
    """Parameters as they lie here. The layers' scales differ by a factor of 30. Four heads of width 40 are a matrix of
    160 rows, so its moments are factored; those of w_k, of 40 rows, are not."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale: float | np.ndarray = 1.0):
        return jnp.array(rng.normal(size=shape) * scale, jnp.float32)

    def of_layers(*shape, scale=1.0):
        return draw(n_layer, *shape, scale=scale * 30.0 ** -np.arange(n_layer).reshape(-1, *[1] * len(shape)))

    unit = dict(
        w_q=dict(kernel=of_layers(4, 40, 130, scale=0.1)),
        w_k=dict(kernel=of_layers(1, 40, 130, scale=0.1)),
        w_o=dict(kernel=of_layers(4, 40, 130, scale=0.02)),
        norm=dict(scale=of_layers(130)),
        u=of_layers(4, 40, scale=0.0 if seed == 0 else 1.0),
    )
    return dict(embedding=draw(150, 130), pe_scale=draw(), layers=dict(unit0=unit))


def one_per_layer(params) -> dict:
    """The same parameters as the original has them: one array for each layer, matrices with two axes."""
    arrays = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        for layer, own in enumerate(x) if "layers" in name else [("", x)]:
            arrays[f"{name}{layer}"] = own.reshape(-1, own.shape[-1]) if "kernel" in name else own.reshape(own.shape)
            if name.endswith("['u']"):
                arrays[f"{name}{layer}"] = own.reshape(-1)
    return arrays


@pytest.mark.slow(2)
@pytest.mark.parametrize("relative", [True, slow(False)])
def test_twenty_steps_of_adafactor_are_those_of_optax(relative):
    settings = OptimizerSettings(
        name="adafactor", learning_rate=0.01, schedule="cosine", warmup_steps=WARMUP, final_fraction=FINAL,
        weight_decay=0.003, clip_norm=0.0, multiply_by_parameter_scale=relative,
    )  # fmt: skip
    params = stacked_tree(0)
    gradients = gradients_of(stacked_tree)
    optimizer = optax.adafactor(0.01, multiply_by_parameter_scale=relative, clipping_threshold=1.0)
    expected = one_per_layer(params)
    state, update = optimizer.init(expected), jax.jit(optimizer.update)
    for step, grads in enumerate(gradients):
        updates, state = update(one_per_layer(grads), state, expected)
        share = share_of("cosine", step)
        for name, w in expected.items():
            expected[name] = w + share * updates[name] - (0.003 * w if w.ndim == 2 else 0.0)
    found = one_per_layer(trained(settings, params, gradients))
    start = one_per_layer(params)
    assert set(found) == set(expected)
    for name in expected:
        moved = np.asarray(expected[name] - start[name])
        np.testing.assert_allclose(found[name] - start[name], moved, rtol=2e-3, atol=2e-3 * np.abs(moved).max())


def test_a_relative_step_is_the_learning_rates_share_of_each_layers_scale():
    settings = dataclasses.replace(BASE, name="adafactor", learning_rate=0.01)
    assert settings.multiply_by_parameter_scale  # unless one says otherwise
    params = stacked_tree(0)
    moved = jax.tree.map(jnp.subtract, trained(settings, params, [stacked_tree(1)]), params)

    def rms(x):
        return np.sqrt(np.mean(np.square(np.float64(x)), axis=tuple(range(1, x.ndim))))

    for name in ("w_q", "w_k", "w_o"):
        kernel, step = (t["layers"]["unit0"][name]["kernel"] for t in (params, moved))
        assert rms(kernel)[0] > 20 * rms(kernel)[1]
        np.testing.assert_allclose(rms(step), 0.01 * np.maximum(rms(kernel), 1e-3), rtol=0.02)


def test_moments_of_large_matrices_are_factored_and_layers_have_their_own():
    params = stacked_tree(0)
    state = make_optimizer(OptimizerSettings(name="adafactor"), STEPS, GAMMA).init(params)
    _, adafactor, *_ = cast(tuple, cast(optax.MaskedState, state).inner_state)
    moments = adafactor.moments
    unit = moments["layers"]["unit0"]
    assert jax.tree.map(jnp.shape, unit["w_q"]["kernel"])._asdict() == dict(rows=(2, 4, 40), columns=(2, 130))
    assert jax.tree.map(jnp.shape, moments["embedding"])._asdict() == dict(rows=(150,), columns=(130,))
    assert unit["w_k"]["kernel"].shape == (2, 1, 40, 130)  # too few rows
    assert unit["norm"]["scale"].shape == (2, 130)  # though as an array it has two axes


@pytest.mark.parametrize("sizes", [dict(data=4, model=2), slow(dict(data=8))])
def test_adafactor_sends_no_matrix_over_the_mesh(eight_devices, sizes):
    """Of several heads too, whose kernels may be split along the width and the heads at once."""
    settings = Settings(
        model=TransformerConfig(head_type="mha", n_head=4, d_model=256, d_k=128, d_v=128, n_code=4, n_vocab=512),
        train=TrainSettings(batch_size=8),
        optimizer=OptimizerSettings(name="adafactor"),
        mesh=MeshSettings(**sizes),
    )
    mesh = make_mesh(settings.mesh, eight_devices)
    state = abstract_train_state(settings, mesh)
    optimizer = make_optimizer(settings.optimizer, 10, GAMMA)
    shardings = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))
    update = jax.jit(optimizer.update, out_shardings=shardings).lower(state.params, state.opt_state, state.params)
    sent = Program(update.compile().as_text() or "").collectives(mesh.shape.items())
    w_q = state.params["layers"]["unit0"]["w_q"]["kernel"]
    assert not w_q.sharding.is_fully_replicated
    assert sent
    assert max(c.bytes for c in sent) < w_q.size * 4 / 8


# --- what holds for all of them --------------------------------------------------------------------------------------


def one_step(**settings) -> tuple[dict, dict, dict, optax.OptState]:
    params, grads = tree(0), tree(1)
    optimizer = make_optimizer(dataclasses.replace(BASE, **settings), 10, GAMMA)
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    return params, grads, cast(dict, updates), state


@pytest.mark.slow(2)
@pytest.mark.parametrize("name", NAMES)
def test_decay_is_not_scaled_and_spares_vectors(name):
    """Neither the learning rate nor the schedule scales it: the first step of a warm-up moves nothing else."""
    params, _, plain, _ = one_step(name=name, warmup_steps=5)
    _, _, decayed, _ = one_step(name=name, warmup_steps=5, weight_decay=0.01)
    np.testing.assert_array_equal(plain["w"]["kernel"], 0.0)
    np.testing.assert_allclose(decayed["w"]["kernel"], -0.01 * params["w"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(decayed["norm"]["scale"], 0.0)


@pytest.mark.slow(2)
@pytest.mark.parametrize("name", NAMES)
def test_optimizers_descend_and_codebooks_follow_their_average_without_a_state(name):
    params, grads, updates, state = one_step(name=name)
    assert jnp.sum(grads["w"]["kernel"] * updates["w"]["kernel"]) < 0
    assert np.abs(updates["w"]["kernel"]).max() <= 3 * 0.5 + 1e-5  # steps of the size of the learning rate
    moved = ema_update(params["quantizer"], grads["quantizer"], GAMMA)
    jax.tree.map(np.testing.assert_array_equal, updates["quantizer"], moved)
    assert not any(is_codebook(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))


def test_clipping_is_by_the_norm_of_the_weights_alone():
    """A codebook's sums are large; they must not shrink the weights' gradients."""
    grads = tree(1)
    optimizer = make_optimizer(dataclasses.replace(BASE, name="adamw", clip_norm=1.0, eps=1.0), 10, GAMMA)
    huge = grads | dict(quantizer=jax.tree.map(lambda x: x * 1e6, grads["quantizer"]))
    state = optimizer.init(grads)
    with_sums, without = (cast(dict, optimizer.update(tree, state, grads)[0]) for tree in (huge, grads))
    np.testing.assert_array_equal(with_sums["w"]["kernel"], without["w"]["kernel"])


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_state_has_the_form_that_older_checkpoints_have(name):
    """The chain as it was before the decay stood last, written out. Orbax compares all of it, empty entries too."""
    directions = dict(adamw=optax.scale_by_adam(), lion=optax.scale_by_lion())
    gone = optax.MaskedNode()
    weights = dict(w=dict(kernel=True), norm=dict(scale=True), quantizer=dict(codebook=False, count=False))
    matrices = dict(w=dict(kernel=True), norm=dict(scale=False), quantizer=dict(codebook=gone, count=gone))
    for clip_norm in (0.0, 1.0):
        steps = optax.chain(
            optax.clip_by_global_norm(1.0) if clip_norm else optax.identity(),
            directions[name],
            optax.scale(1.0),
            optax.add_decayed_weights(0.1, matrices),
            optax.scale_by_learning_rate(lambda step: 1.0),
        )
        older = optax.masked(steps, weights).init(tree(0))
        settings = OptimizerSettings(name=name, clip_norm=clip_norm, weight_decay=0.1)
        newer = make_optimizer(settings, 10, GAMMA).init(tree(0))
        assert jax.tree.structure(older) == jax.tree.structure(newer)
        assert jax.tree.map(jnp.shape, older) == jax.tree.map(jnp.shape, newer)


# --- schedules and configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize("name", ["cosine", "linear", "inverse_sqrt"])
def test_schedules_are_the_originals(name, warmup):
    """A straight line from 0, which the first step takes; then down to the final share, which stays."""
    share = schedule(OptimizerSettings(schedule=name, warmup_steps=warmup, final_fraction=FINAL), num_steps=STEPS)
    steps = range(STEPS + 5)
    expected = [share_of(name, step, warmup) for step in steps]
    assert expected[warmup] == 1.0
    np.testing.assert_allclose(np.array([share(step) for step in steps]), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["enwik8", "pg19", "imagenet64"])
def test_configs_of_the_papers_data_sets_have_its_hyperparameters(name):
    """As in the launch scripts of the original's code, and in its optimizer's definition."""
    table = dict(  # enwik8, pg19, imagenet64
        optimizer__name=("adamw", "adafactor", "adafactor"),
        optimizer__learning_rate=(4e-4, 0.01, 0.01),
        optimizer__schedule=("cosine", "cosine", "cosine"),
        optimizer__warmup_steps=(10_000, 10_000, 10_000),
        optimizer__final_fraction=(0.1, 0.1, 0.1),
        optimizer__weight_decay=(2e-4, 0.0, 0.0),
        optimizer__clip_norm=(0.1, 0.0, 0.0),
        optimizer__b1=(0.9, None, None),
        optimizer__b2=(0.98, None, None),
        optimizer__eps=(1e-9, None, None),
        optimizer__multiply_by_parameter_scale=(None, True, True),
        train__num_steps=(125_000, 500_000, 500_000),
        train__batch_size=(128, 128, 128),
        train__update_len=(2048, 2048, 1536),
        model__p_dropemb=(0.0, 0.0, 0.0),
        model__p_dropsin=(0.2, 0.1, 0.1),
        model__p_dropres=(0.5, 0.1, 0.0),
        model__p_droplyr=(0.3, 0.1, 0.0),
        model__c_beta=(1e-4, 1e-4, 1e-4),
        model__c_gamma=(0.99, 0.99, 0.99),
        model__e_scale=(1.0, 0.005, 0.005),
        model__e_tie=(False, True, True),
        model__e_norm=(False, True, True),
        model__pe_abs=(False, False, True),
        sample__top_p=(0.9, 0.8, 0.999),
    )
    config = importlib.import_module(f"configs.{name}").get_config()
    for setting, values in table.items():
        group, field = setting.split("__")
        value = dict(zip(("enwik8", "pg19", "imagenet64"), values, strict=True))[name]
        assert value is None or config[group][field] == value, setting
