"""The moving average of the weights: what it is, what moves it, that it survives restarts, and who reads it."""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.made_run import make_run, settings_of
from tests.made_up import first_state, made_up_step
from tests.run.saved import RECORD, SCHEDULE, SETTINGS, a_batch
from tests.training.test_bad_steps import NoSignals, settings_for
from tvq_pod.config.settings import CheckpointSettings, EvalSettings, MeshSettings, Settings
from tvq_pod.modes import train as train_module
from tvq_pod.modes.sample import sample
from tvq_pod.nn.codebook import codebook_average
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.hashes import sha256_of
from tvq_pod.run.saved_state import State
from tvq_pod.training import ema, restore
from tvq_pod.training.step import abstract_batch, abstract_train_state, make_train_step, weights_in_use

DECAY = 0.7


def with_decay(settings: Settings, decay: float, **optimizer) -> Settings:
    changed = dataclasses.replace(settings.optimizer, **optimizer)
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, ema_decay=decay), optimizer=changed)


AVERAGED = with_decay(SETTINGS, DECAY, name="muon")


def decay_of(t: int) -> float:
    """Of the t-th step, from 1."""
    return min(DECAY, (1 + t) / (10 + t))


def of_quantizer(tree: dict) -> dict:
    return {name: np.float64(leaf) for name, leaf in tree.items()}


def history(n_steps: int) -> list[dict]:
    """Parameters after each of some steps. The third code is unused for long, and revived in the last but one."""
    rng, trees = np.random.default_rng(0), []
    for t in range(n_steps):
        count = np.array([[4.0, 2.0 + t, 1e-6 if t < n_steps - 2 else 3.0]], np.float32)
        codebook = rng.normal(size=[1, 3, 2]).astype(np.float32)
        codebook[0, 2] = 5.0 if t < n_steps - 2 else -1.0
        kernel = rng.normal(size=[2, 3]).astype(np.float32)
        trees.append(dict(w=dict(kernel=kernel), quantizer=dict(codebook=codebook, count=count)))
    return trees


def mixed(share: float, old, new):
    return share * old + (1 - share) * np.float64(new)


def averaged(trees: list[dict]) -> dict:
    average, moved = ema.start(trees[0]), jax.jit(ema.moved)
    for t, params in enumerate(trees[1:], start=1):
        average = moved(average, params, ema.decay_after(jnp.int32(t - 1), DECAY))
    return jax.device_get(average)


def test_it_is_a_weighted_mean_of_all_weights_so_far_and_codes_are_means_of_their_keys():
    """The weights of each step written out, in float64."""
    trees = history(9)
    shares = np.ones(1)
    for t in range(1, len(trees)):
        shares = np.append(shares * decay_of(t), 1.0 - decay_of(t))
    assert shares.sum() == pytest.approx(1.0)
    assert decay_of(1) < decay_of(5) < decay_of(24) == DECAY
    found = averaged(trees)
    expected = sum(share * np.float64(tree["w"]["kernel"]) for share, tree in zip(shares, trees, strict=True))
    np.testing.assert_allclose(found["w"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    codes = [of_quantizer(tree["quantizer"]) for tree in trees]
    count = sum(share * code["count"] for share, code in zip(shares, codes, strict=True))
    keys = sum(share * code["count"][..., None] * code["codebook"] for share, code in zip(shares, codes, strict=True))
    np.testing.assert_allclose(found["quantizer"]["count"], count, rtol=1e-5)
    np.testing.assert_allclose(found["quantizer"]["codebook"], keys / count[..., None], rtol=1e-4, atol=1e-5)


def test_a_code_that_was_revived_is_where_it_is_now_and_not_on_the_way():
    np.testing.assert_allclose(averaged(history(9))["quantizer"]["codebook"][0, 2], [-1.0, -1.0], atol=1e-4)


def test_averaged_codes_are_as_near_to_averaged_keys_as_codes_are_to_keys_in_training():
    """Keys are w x, of a weight w that turns slowly; the codebook follows its own moving average, some steps behind.
    Averaged codes are behind the keys of the averaged weight by as much, and the codes of now far ahead of them."""
    gamma, rng = 0.9, np.random.default_rng(0)
    inputs = np.array([[1.0, 0.0], [0.0, 1.0]]) + 0.05 * rng.normal(size=[200, 1, 2])  # two clusters
    optimizer = codebook_average(gamma)
    update, moved = jax.jit(optimizer.update), jax.jit(ema.moved)
    params = dict(w=np.eye(2), quantizer=dict(codebook=jnp.eye(2)[None], count=jnp.full([1, 2], 200.0)))
    average = ema.start(params)
    for t in range(1, 200):
        angle = 0.005 * t
        w = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        keys = np.swapaxes(inputs @ w.T, 0, 1)  # [cluster, key, 2]
        sums = dict(codebook=jnp.array(keys.sum(1))[None], count=jnp.full([1, 2], 200.0))
        steps, _ = update(dict(quantizer=sums), optimizer.init(params), dict(quantizer=params["quantizer"]))
        codes = jax.tree.map(jnp.add, params["quantizer"], cast(dict, steps)["quantizer"])
        params = dict(w=w, quantizer=codes)
        average = moved(average, params, jnp.float32(0.98))

    def distance(weights: dict, codes: dict) -> float:
        """From a cluster's mean key to its code."""
        keys = (inputs @ np.asarray(weights["w"]).T).mean(0)
        return float(np.linalg.norm(codes["quantizer"]["codebook"][0] - keys, axis=-1).max())

    in_training, averaged, of_now = distance(params, params), distance(average, average), distance(average, params)
    assert averaged == pytest.approx(in_training, rel=0.25)
    assert of_now > 3 * averaged


# ------------------------------------------------------------------ in the train state


def mesh_of(n_devices: int) -> jax.sharding.Mesh:
    return make_mesh(MeshSettings(), jax.devices()[:n_devices])


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1)


@pytest.mark.slow(2)
def test_it_is_float32_lies_as_the_parameters_do_and_is_overwritten_by_the_step(eight_devices):
    model = SETTINGS.model.replace(param_dtype="bfloat16", dtype="bfloat16")
    settings = dataclasses.replace(with_decay(SETTINGS, DECAY), model=model)
    mesh = mesh_of(8)
    state = abstract_train_state(settings, mesh)
    jax.tree.map(lambda a, b: _assert_like(a, b), state.ema, state.params)
    assert abstract_train_state(dataclasses.replace(SETTINGS, model=model), mesh).ema is None
    lowered = make_train_step(settings, mesh).lower(state, abstract_batch(settings, mesh))
    given, recurrent, _ = lowered.args_info[0]
    assert {info.donated for info in jax.tree.leaves(given.ema)} == {True}
    assert {info.donated for info in jax.tree.leaves(recurrent)} == {False}


def _assert_like(average, param):
    assert (average.shape, average.sharding, average.dtype) == (param.shape, param.sharding, jnp.float32)


def test_evaluations_and_samples_take_it_in_the_dtype_of_the_parameters(mesh):
    state = first_state(AVERAGED, mesh)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1.0, state.ema))
    jax.tree.map(np.testing.assert_array_equal, weights_in_use(state), state.ema)
    coarse = state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights_in_use(coarse))} == {jnp.dtype(jnp.bfloat16)}
    assert weights_in_use(state.replace(ema=None)) is state.params


@functools.cache
def step_of(n_devices: int):
    """The real step of AVERAGED, and its first state."""
    mesh = mesh_of(n_devices)
    step = make_train_step(AVERAGED, mesh)
    return mesh, step, first_state(AVERAGED, mesh)


def a_copy(state):
    return jax.tree.map(jnp.copy, state)


def after(state, mesh, step, first: int, last: int, poisoned: int = 0):
    """The state after steps first + 1 .. last, the parameters after each, and whether it was bad."""
    params, bad = [], []
    for n in range(first + 1, last + 1):
        batch = a_batch(mesh, n)
        if n == poisoned:
            batch = batch | dict(loss_mask=batch["loss_mask"] * jnp.nan)
        state, metrics = step(state, batch)
        params.append(jax.device_get(state.params))
        bad.append(int(metrics["n_bad"]))
    return state, params, bad


@pytest.mark.slow
def test_a_bad_step_does_not_move_it():
    """Five steps of the real program, the third of them bad, against the same in numpy."""
    mesh, step, start = step_of(1)
    state, params, bad = after(a_copy(start), mesh, step, 0, 5, poisoned=3)
    assert bad == [0, 0, 1, 0, 0]
    expected = jax.tree.map(np.float64, jax.device_get(start.params))
    for t, (new, is_bad) in enumerate(zip(params, bad, strict=True), start=1):
        if is_bad:
            continue
        expected = jax.tree.map(functools.partial(mixed, decay_of(t)), expected, new)
    found = jax.device_get(state.ema)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        if path[-1].key != "codebook":  # whose weights are counts
            here = dict(jax.tree_util.tree_leaves_with_path(found))[path]
            np.testing.assert_allclose(here, leaf, rtol=1e-4, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("n_devices", [pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)])
def test_a_run_with_muon_and_an_average_resumes_with_the_same_bits(tmp_path, n_devices):
    """Saved after two steps and restored into a fresh process's place, against four steps in one go."""
    mesh, step, start = step_of(n_devices)
    alone, *_ = after(a_copy(start), mesh, step, 0, 4)
    state, *_ = after(a_copy(start), mesh, step, 0, 2)
    checkpoints = saved(tmp_path, 2, state)
    restored = checkpoints.restore(2, abstract_train_state(AVERAGED, mesh))
    checkpoints.close()
    resumed, *_ = after(restored, mesh, step, 2, 4)
    assert sha256_of(resumed) == sha256_of(alone)
    assert sha256_of(resumed.ema) != sha256_of(resumed.params)


# ------------------------------------------------------------------ in checkpoints


def saved(workdir, step: int, state: State) -> Checkpoints:
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    checkpoints.save(state, step, RECORD, SCHEDULE)
    assert checkpoints.wait(), checkpoints.error
    return checkpoints


def state_of(settings: Settings, workdir, mesh):
    """What training resumes with."""
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    state = restore.state_at(2, SCHEDULE, checkpoints, settings, mesh)
    checkpoints.close()
    return state


@pytest.mark.slow(2)
def test_switched_on_it_starts_at_the_weights_and_switched_off_it_is_dropped_each_with_a_line(tmp_path, mesh, capsys):
    plain, averaged = SETTINGS, with_decay(SETTINGS, DECAY)
    saved(tmp_path / "plain", 2, first_state(plain, mesh)).close()
    with_average = first_state(averaged, mesh)
    with_average = with_average.replace(ema=jax.tree.map(lambda x: x + 1.0, with_average.ema))
    saved(tmp_path / "averaged", 2, with_average).close()
    capsys.readouterr()

    state = state_of(averaged, tmp_path / "plain", mesh)
    assert "config.train.ema_decay=0.7: checkpoint 2 has no moving average; it starts from the weights" in (
        capsys.readouterr().err
    )
    assert sha256_of(state.ema) == sha256_of(state.params)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.ema, state.params))]
    assert len(set(places)) == len(places)  # a step may overwrite one and not the other

    state = state_of(plain, tmp_path / "averaged", mesh)
    assert "config.train.ema_decay=0.0: the moving average of the weights in checkpoint 2 is dropped" in (
        capsys.readouterr().err
    )
    assert state.ema is None
    assert not (tmp_path / "plain/checkpoints/2/ema").exists()  # as checkpoints have always been

    state = state_of(averaged, tmp_path / "averaged", mesh)
    assert "moving average" not in capsys.readouterr().err
    assert sha256_of(state.ema) == sha256_of(with_average.ema)


def test_readers_get_the_average_if_there_is_one_or_the_raw_weights(tmp_path, mesh, capsys):
    averaged = with_decay(SETTINGS, DECAY)
    state = first_state(averaged, mesh)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1.0, state.ema))
    saved(tmp_path / "averaged", 2, state).close()
    saved(tmp_path / "plain", 2, first_state(SETTINGS, mesh)).close()
    abstract = abstract_train_state(SETTINGS, mesh).params
    for folder, weights, expected in (
        ("averaged", "ema", state.ema),
        ("averaged", "raw", state.params),
        ("plain", "ema", state.params),
    ):
        reader = CheckpointReader(tmp_path / folder)
        assert sha256_of(reader.restore_params(2, abstract, weights)) == sha256_of(expected)
        reader.close()
        is_average = expected is state.ema
        assert ("the weights are their moving average at step 2" in capsys.readouterr().err) == is_average


@pytest.mark.slow
def test_samples_are_drawn_from_the_average(tmp_path, capsys):
    """--mode=sample of a run that has one gives the text of a run whose weights are that average."""

    def other_weights(params):
        return jax.tree.map(lambda x: x[..., ::-1], params)

    averaged, plain = with_decay(settings_of(), DECAY), settings_of()
    changes = dict(
        averaged=lambda state: state.replace(ema=other_weights(state.ema)),
        plain=lambda state: state.replace(params=other_weights(state.params)),
        untouched=lambda state: state,
    )
    for name, changed in changes.items():
        (tmp_path / name).mkdir()
        make_run(tmp_path / name, averaged if name == "averaged" else plain, changed=changed)

    def text_of(name, settings, weights="ema"):
        how = dataclasses.replace(settings.sample, length=12)
        settings = dataclasses.replace(settings, sample=how, eval=EvalSettings(weights=weights))
        sample(settings, epath.Path(tmp_path / name), [b"abc"], None)
        return capsys.readouterr().out

    average, raw = text_of("plain", plain), text_of("untouched", plain)
    assert average != raw
    assert text_of("averaged", averaged) == average
    assert text_of("averaged", averaged, "raw") == raw


@pytest.mark.slow(2)
def test_the_sample_at_the_end_of_training_is_drawn_from_the_average(corpus, tmp_path, monkeypatch):
    """The made-up step moves the weights, and the real average follows them."""
    given, settings = [], with_decay(settings_for(corpus), DECAY)
    settings = dataclasses.replace(
        settings,
        sample=dataclasses.replace(settings.sample, length=5),
        train=dataclasses.replace(settings.train, num_steps=3),
    )
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)
    monkeypatch.setattr(train_module, "keep_sample", lambda settings, workdir, params, step: given.append(params))
    train_module.train(settings, epath.Path(tmp_path), NoSignals())
    reader = CheckpointReader(tmp_path)
    saved_state = reader.restore(3, abstract_train_state(settings, make_mesh(settings.mesh)))
    reader.close()
    (params,) = given
    assert sha256_of(params) == sha256_of(weights_in_use(saved_state)) != sha256_of(saved_state.params)
