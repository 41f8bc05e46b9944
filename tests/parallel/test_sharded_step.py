"""One global jit over a mesh: rows, tokens and heads over eight devices give what one device gives.

Few meshes, each compiled once: between them they have every axis, and most of the axes at once.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.parallel.sharded import N_VOCAB, ROWS, STEPS, UPDATE_LEN, mesh_of, settings_of
from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.inference.evaluator import make_eval_state, make_eval_step
from tvq_pod.parallel.sharding import batch_sharding
from tvq_pod.training.step import TrainState, abstract_train_state, create_train_state, make_train_step

ALONE = (1, 1, 1, 1)  # slices, data, sequence, model
STILL = dict(p_dropemb=0.0, p_dropsin=0.0, p_dropres=0.0, p_droplyr=0.0)
# A vocabulary that is wider than the model: its losses go block by block. A window of two blocks.
MQA = dict(head_type="mqa", n_head=8, d_ff=16, n_vocab=24, mem_len=6, n_layer=1)
# Microbatches draw other masks of dropout than the batch that they are parts of.
MHA = dict(
    head_type="mha", n_head=8, d_ff=16, window_bias=2.0, mem_len=6, agg_cache=False, key_shift=True, n_layer=1, **STILL
)


def batches(sharding):
    rng, first_id = np.random.default_rng(0), 0
    for _ in range(STEPS):
        tokens = rng.integers(0, N_VOCAB, size=[2, ROWS, UPDATE_LEN]).astype(np.int32)
        doc_ids = first_id + np.sort(rng.integers(0, 3, size=[ROWS, UPDATE_LEN]), axis=1).astype(np.int32)
        mask = (rng.uniform(size=[ROWS, UPDATE_LEN]) < 0.9).astype(np.float32)
        yield jax.device_put(dict(inputs=tokens[0], targets=tokens[1], doc_ids=doc_ids, loss_mask=mask), sharding)
        first_id += 2  # some documents go on in the next update


@functools.cache
def start_alone(settings: Settings):
    """The state before the first step, made by one device."""
    alone = dataclasses.replace(
        settings, mesh=MeshSettings(data=1), train=dataclasses.replace(settings.train, microbatches=1)
    )
    return jax.device_get(create_train_state(alone, mesh_of(alone)))


@dataclasses.dataclass
class Trained:
    """The parameters after the first step, the state after the last, and the metrics of each."""

    first_params: dict
    state: TrainState
    metrics: list[dict]


@functools.cache
def trained(settings: Settings, made_there: bool = False) -> Trained:
    """made_there: whether the state is made on the mesh, where it must be compiled for, or by one device."""
    mesh, params, metrics = mesh_of(settings), [], []
    if made_there:
        state = create_train_state(settings, mesh)
    else:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh))
        state = jax.device_put(start_alone(settings), shardings)
    step_fn = make_train_step(settings, mesh)
    for batch in batches(batch_sharding(mesh)):
        state, step_metrics = step_fn(state, batch)
        metrics.append(step_metrics)
        if not params:
            params.append(jax.tree.map(np.array, state.params))  # copies: the next step takes the state
    return Trained(params[0], jax.device_get(state), jax.device_get(metrics))


def assert_same_as_alone(mesh, model=None, *, made_there=False, microbatches=1, fsdp=True, weight_decay=0.0):
    """The training on the mesh is that of one device, with the cumulative reduction, by XLA, in one batch: metrics of
    every step, parameters, codebooks, states."""
    settings = settings_of(mesh, model, microbatches=microbatches, fsdp=fsdp, weight_decay=weight_decay)
    ours = trained(settings, made_there)
    by_xla = (model or {}) | dict(reduction="cumulative", attention="xla", remat="none")
    alone = trained(settings_of(ALONE, by_xla, weight_decay=weight_decay))
    for a, b in zip(ours.metrics, alone.metrics, strict=True):
        assert a["grad_norm"] > 0.01
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)

    def same(path, a, b):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3, err_msg=jax.tree_util.keystr(path))

    for part in ("params", "recurrent"):
        jax.tree_util.tree_map_with_path(same, getattr(ours.state, part), getattr(alone.state, part))


@pytest.mark.slow(20)
def test_losses_parameters_codebooks_and_states_do_not_depend_on_the_mesh(eight_devices):
    """Dropout and LayerDrop on, documents that go on over updates, positions that are masked; rows, tokens and widths
    over two devices each, parameters over those of the rows."""
    assert_same_as_alone((1, 2, 2, 2), made_there=True)


@pytest.mark.slow
def test_nor_do_they_on_several_slices(eight_devices):
    assert_same_as_alone((2, 2, 1, 2), made_there=True)


@pytest.mark.slow
def test_the_kernels_train_over_rows_blocks_and_columns_as_xla_does_on_one_device(eight_devices):
    """Two layers, whose states and whatever the backward pass needs lie in stacks."""
    assert_same_as_alone((1, 2, 2, 2), dict(attention="pallas", remat="projections"))


@pytest.mark.slow
def test_the_serial_reduction_goes_over_shards_of_one_block_each(eight_devices):
    assert_same_as_alone((1, 1, 8, 1), dict(reduction="serial"))


@pytest.mark.slow
def test_query_heads_and_the_losses_of_a_wide_vocabulary_are_spread(eight_devices):
    assert_same_as_alone((1, 2, 2, 2), MQA, weight_decay=0.01)


@pytest.mark.slow
def test_heads_are_spread_and_microbatches_add_up_to_the_batch(eight_devices):
    """Losses, gradients, the codebook's moving average and the states; without the cache, and with parameters that are
    whole everywhere."""
    assert_same_as_alone((1, 2, 2, 2), MHA, microbatches=4, fsdp=False)


@pytest.mark.slow
def test_a_document_may_be_cut_at_any_place_of_any_shard(eight_devices):
    """Row t has cuts at t and some places on; losses and states as on one device."""
    rows, update_len = 24, 24
    rng = np.random.default_rng(1)
    t = np.arange(update_len)
    doc_ids = [
        (t >= row).astype(np.int32) + (t >= row + rng.integers(1, 9)) + 2 * update * np.ones_like(t)
        for update in range(2)
        for row in range(rows)
    ]
    doc_ids = np.stack(doc_ids).reshape(2, rows, update_len).astype(np.int32)
    tokens = rng.integers(0, N_VOCAB, size=[2, rows, update_len]).astype(np.int32)
    results = []
    for sizes in [ALONE, (1, 1, 4, 2)]:
        settings = settings_of(sizes)
        mesh = mesh_of(settings)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh).params)
        params = jax.device_put(start_alone(settings).params, shardings)
        state, step = make_eval_state(settings, mesh, rows), make_eval_step(settings, mesh, rows)
        for ids, x in zip(doc_ids, tokens, strict=True):
            ones = np.ones(x.shape, np.float32)
            batch = dict(inputs=x, targets=np.roll(x, 1), doc_ids=ids, loss_mask=ones * (t % 5 > 0))
            state, sums = step(params, state, jax.device_put(batch, batch_sharding(mesh)))
        results.append(jax.device_get((state, sums)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *results)


@pytest.mark.slow(3)
def test_every_part_of_the_state_moves(eight_devices):
    settings = settings_of(ALONE)
    start, end = start_alone(settings), trained(settings).state
    for path, before in jax.tree_util.tree_leaves_with_path((start.params, start.recurrent)):
        after = dict(jax.tree_util.tree_leaves_with_path((end.params, end.recurrent)))[path]
        assert np.abs(np.asarray(after, np.float32) - np.asarray(before, np.float32)).max() > 0, path
    assert int(end.step) == STEPS


def test_the_codebook_is_moved_by_its_average_and_not_by_the_optimizer(eight_devices):
    """In a step whose learning rate is 0, the first of the warm-up, weights stand still and codes move."""
    settings = settings_of(ALONE)
    result = trained(settings)
    assert result.metrics[0]["learning_rate"] == 0.0
    before = dict(jax.tree_util.tree_leaves_with_path(start_alone(settings).params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.first_params):
        moved = not np.array_equal(leaf, before[path])
        assert moved == ("quantizer" in jax.tree_util.keystr(path)), path
