"""One global jit over a mesh: rows over eight devices give what one device gives."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.common import small_config
from tvq_pod.config import MeshSettings, OptimizerSettings, Settings, TrainSettings, check_divides
from tvq_pod.errors import UserError
from tvq_pod.parallel import sharding
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.train_state import abstract_train_state, create_train_state, make_train_step

ROWS, UPDATE_LEN = 8, 12
SETTINGS = Settings(
    model=small_config(p_dropemb=0.1, p_dropsin=0.1, p_dropres=0.2, p_droplyr=0.2, c_gamma=0.9, n_layer=1),
    train=TrainSettings(batch_size=ROWS, update_len=UPDATE_LEN, num_steps=3),
    optimizer=OptimizerSettings(learning_rate=0.01, warmup_steps=0, weight_decay=0.01),
)


def batches(sharding):
    rng = np.random.default_rng(0)
    for step in range(3):
        tokens = rng.integers(0, 11, size=[2, ROWS, UPDATE_LEN]).astype(np.int32)
        doc_ids = 3 * step + np.sort(rng.integers(0, 3, size=[ROWS, UPDATE_LEN]), axis=1).astype(np.int32)
        mask = (rng.uniform(size=[ROWS, UPDATE_LEN]) < 0.9).astype(np.float32)
        batch = dict(inputs=tokens[0], targets=tokens[1], doc_ids=doc_ids, loss_mask=mask)
        yield jax.device_put(batch, sharding)


@pytest.fixture(scope="module")
def trained(eight_devices):
    """By number of devices: the state after three steps, and the losses."""
    results = {}
    for n_devices in (1, 8):
        mesh = make_mesh(MeshSettings(), eight_devices[:n_devices])
        state = create_train_state(SETTINGS, mesh)
        step_fn = make_train_step(SETTINGS, mesh)
        metrics = []
        for batch in batches(jax.NamedSharding(mesh, jax.P("data"))):
            state, step_metrics = step_fn(state, batch)
            metrics.append(jax.device_get(step_metrics))
        results[n_devices] = state, metrics
    return results


def test_losses_and_parameters_do_not_depend_on_the_mesh(trained):
    """Dropout on, codebooks and recurrent state included."""
    (one, one_metrics), (eight, eight_metrics) = trained[1], trained[8]
    for a, b in zip(one_metrics, eight_metrics, strict=True):
        assert a["grad_norm"] > 0.01
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)

    def same(path, a, b):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(same, one.params, eight.params)
    jax.tree_util.tree_map_with_path(same, one.recurrent, eight.recurrent)


def test_every_part_of_the_state_moves(trained, eight_devices):
    start = create_train_state(SETTINGS, make_mesh(MeshSettings(), eight_devices[:1]))
    end, _ = trained[8]
    for path, before in jax.tree_util.tree_leaves_with_path((start.params, start.recurrent)):
        after = dict(jax.tree_util.tree_leaves_with_path((end.params, end.recurrent)))[path]
        assert np.abs(np.asarray(after, np.float32) - np.asarray(before, np.float32)).max() > 0, path
    assert int(end.step) == 3


def test_rows_of_state_are_spread_and_parameters_are_where_the_rules_say(trained):
    state, _ = trained[8]
    for leaf in jax.tree.leaves(state.recurrent):  # [layers, batch, ...]
        assert leaf.sharding.shard_shape(leaf.shape)[1] == ROWS // 8
    for leaf in jax.tree.leaves(state.params):
        assert leaf.sharding.is_fully_replicated
    abstract = abstract_train_state(SETTINGS, make_mesh(MeshSettings()))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_an_optimizers_arrays_lie_as_their_parameters_do(monkeypatch, eight_devices):
    """Under rules that do split parameters."""
    rules = tuple((name, "data" if name == "embed" else axis) for name, axis in sharding.RULES)
    monkeypatch.setattr(sharding, "RULES", rules)
    abstract = abstract_train_state(SETTINGS, make_mesh(MeshSettings(), eight_devices))
    params = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)}
    split = {path for path, leaf in params.items() if not leaf.sharding.is_fully_replicated}
    assert "['embedding']" in split
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state):
        owners = [name for name in params if jax.tree_util.keystr(path).endswith(name)]
        if owners:
            assert leaf.sharding == params[owners[0]].sharding
            found += owners[0] in split
    assert found == 2 * len(split)  # Adam's two moments


def test_mesh_sizes_that_do_not_fit_are_named(eight_devices):
    assert dict(make_mesh(MeshSettings(data=8)).shape) == dict(data=8, sequence=1, model=1)
    with pytest.raises(UserError, match=r"config.mesh.data=3: .*must have 8 devices.*give 8, or -1"):
        make_mesh(MeshSettings(data=3))
    with pytest.raises(UserError, match=r"config.train.batch_size=12: must be a multiple of the 8 devices"):
        check_divides("config.train.batch_size", 12, 8)


def test_the_codebook_is_moved_by_its_average_and_not_by_the_optimizer(eight_devices):
    """With a learning rate of 0 weights stand still and codes move; with c_gamma near 1 the other way round."""
    mesh = make_mesh(MeshSettings(), eight_devices[:1])
    batch = next(batches(jax.NamedSharding(mesh, jax.P())))
    still = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(learning_rate=0.0, weight_decay=0.0))
    before = jax.device_get(create_train_state(still, mesh).params)
    after, _ = make_train_step(still, mesh)(create_train_state(still, mesh), batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.params):
        moved = not np.array_equal(leaf, dict(jax.tree_util.tree_leaves_with_path(before))[path])
        assert moved == ("quantizer" in jax.tree_util.keystr(path)), path
