"""Where arrays lie: the table of names, and the shape of the mesh."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from tvq_pod.config.resolve import resolve
from tvq_pod.config.settings import MeshSettings, Settings, TrainSettings
from tvq_pod.errors import UserError
from tvq_pod.nn.codebook import is_codebook
from tvq_pod.parallel.mesh import check_divides, check_rows, make_mesh, named_axes, sizes
from tvq_pod.parallel.sharding import STORAGE, spec_of
from tvq_pod.planning.cost import topology_devices
from tvq_pod.training.step import abstract_train_state

MIB = 2**20


def mesh_of(eight_devices, data=8, sequence=1, model=1, slices=1):
    return make_mesh(MeshSettings(data=data, sequence=sequence, model=model, slices=slices), eight_devices)


def state_on(mesh_settings: MeshSettings, name: str, optimizer: str):
    """The abstract state of a config of ours."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.optimizer.name = optimizer
    settings = resolve(config)
    settings = dataclasses.replace(settings, mesh=mesh_settings)
    return abstract_train_state(settings, make_mesh(mesh_settings))


@pytest.mark.slow(2)
@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=4, model=2), dict(data=2, sequence=2, model=2)])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_no_large_parameter_is_whole_on_every_device(eight_devices, sizes, optimizer):
    """Nor the optimizer's arrays for it: each device has its share of data times model."""
    n_parts = sizes["data"] * sizes.get("model", 1)
    state = state_on(MeshSettings(**sizes), "enwik8", optimizer)
    large = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        if leaf.size * leaf.dtype.itemsize > MIB and not is_codebook(path):
            n_heads_shared = any(
                name in jax.tree_util.keystr(path) for name in ("w_q", "w_k", "w_r", "embedding", "w_out")
            )
            least = sizes["data"] if n_heads_shared else n_parts  # one head's queries and keys are not split
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * least <= leaf.size, jax.tree_util.keystr(path)
            large += 1
    assert large >= 10


@pytest.mark.parametrize(("topology", "name", "most"), [("v5p:4x4x12", "pg19", 4), ("v5p:16x16x16", "enwik8", 256)])
def test_where_not_all_devices_divide_a_parameter_as_many_as_can_share_it(topology, name, most):
    """On slices of 192 and 4,096 chips: a matrix is split over `most` devices at least."""
    _, devices = topology_devices(topology, 1)
    settings = resolve(importlib.import_module(f"configs.{name}").get_config())
    state = abstract_train_state(settings, make_mesh(MeshSettings(), devices))
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        if leaf.size * leaf.dtype.itemsize > MIB and not is_codebook(path):
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * most <= leaf.size, jax.tree_util.keystr(path)


def test_states_are_spread_over_rows_heads_and_codes(eight_devices):
    state = state_on(MeshSettings(data=2, sequence=2, model=2), "enwik8", "adamw")
    unit = state.recurrent["unit0"]
    parts = jax.tree.map(
        lambda x: tuple(n // m for n, m in zip(x.shape, x.sharding.shard_shape(x.shape), strict=True)), unit
    )
    assert parts["aggcache"]["upper_div_lower"] == (1, 2, 1, 2, 2)  # layers, rows, heads, codes, values
    assert parts["xlcache"]["v"] == (1, 2, 1, 1, 2)
    assert parts["xlcache"]["k_hat"] == (1, 2, 1, 1, 1)


def test_heads_are_split_if_there_are_several_and_values_if_there_is_one(eight_devices):
    mesh = mesh_of(eight_devices, data=2, model=4)
    names = ("heads", "value", "embed")
    assert spec_of(names, (8, 64, 32), mesh) == jax.P("model", None, None)
    assert spec_of(names, (1, 64, 32), mesh) == jax.P(None, "model", None)
    assert spec_of(names, (1, 256, 32), mesh, None) == jax.P(None, ("model", *STORAGE), None)  # whole tiles
    assert spec_of(names, (1, 64, 32), mesh, None) == jax.P(None, "model", STORAGE)  # the longest
    assert spec_of(("vocab", "embed"), (259, 64), mesh, None) == jax.P(None, STORAGE)
    assert spec_of(("vocab", "embed"), (259, 63), mesh, None) == jax.P(None, None)
    with pytest.raises(KeyError):
        spec_of(("no such axis",), (8,), mesh)


def test_sizes_that_do_not_fit_are_named(eight_devices):
    assert sizes(make_mesh(MeshSettings(data=8))) == dict(slice=1, data=8, sequence=1, model=1)
    assert sizes(make_mesh(MeshSettings(sequence=2, slices=2))) == dict(slice=2, data=2, sequence=2, model=1)
    with pytest.raises(UserError, match=r"config.mesh.data=3: .*must use all 8 device\(s\); give 8, or -1"):
        make_mesh(MeshSettings(data=3))
    with pytest.raises(UserError, match=r"config.mesh.data=-1: with sequence=3, .*sequence \* model = 3 must divide 8"):
        make_mesh(MeshSettings(sequence=3))
    with pytest.raises(UserError, match=r"config.mesh.slices=3: must divide 8 devices"):
        make_mesh(MeshSettings(slices=3))
    with pytest.raises(UserError, match=r"config.eval.batch_size=12: must be a multiple of the 8 devices"):
        check_divides("config.eval.batch_size", 12, mesh_of(eight_devices))
    with pytest.raises(
        UserError, match=r"config.train.batch_size=8: .*8 devices.*each of 2 microbatches, for example 16"
    ):
        check_rows(Settings(train=TrainSettings(batch_size=8, microbatches=2)), mesh_of(eight_devices))


def test_slices_are_the_outermost_axis(eight_devices):
    mesh = mesh_of(eight_devices, data=2, model=2, slices=2)
    assert [name for name, _ in named_axes(mesh)] == ["slice", "data", "data", "sequence", "model"]
    first = {device.id for device in mesh.devices[0].flat}
    assert first == {device.id for device in eight_devices[:4]}


def test_small_optimizer_arrays_of_no_parameters_shape_are_whole(eight_devices):
    """Adafactor's factors: a row and a column of each matrix."""
    state = state_on(MeshSettings(data=8), "enwik8", "adafactor")
    whole = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.sharding.is_fully_replicated]
    assert whole
    assert all(leaf.size * leaf.dtype.itemsize <= MIB for leaf in whole)
