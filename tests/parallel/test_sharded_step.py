"""One global jit over a mesh: rows, tokens and heads over eight devices give what one device gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import small_config
from tvq_pod.config.settings import MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.inference.evaluator import make_eval_state, make_eval_step
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.sharding import batch_sharding
from tvq_pod.planning.hlo import Program
from tvq_pod.training.step import abstract_train_state, create_train_state, make_train_step

ROWS, UPDATE_LEN, STEPS, N_VOCAB = 8, 24, 20, 16
MODEL = dict(
    d_model=16, d_k=8, d_v=16, n_code=8, n_head=1, n_layer=1, n_vocab=N_VOCAB, block_len=3, mem_len=3, c_gamma=0.9,
    pe_abs=True, p_dropemb=0.1, p_dropsin=0.1, p_dropres=0.2, p_droplyr=0.2,
)  # fmt: skip
# Of mqa, the vocabulary is wider than the model: its losses go block by block.
HEADS = dict(
    shga={},
    mqa=dict(head_type="mqa", n_head=8, d_ff=16, n_vocab=24),
    mha=dict(head_type="mha", n_head=8, d_ff=16, window_bias=2.0),
)
ALONE = MeshSettings(data=1)
MESHES = [(1, 8, 1, 1), (1, 4, 1, 2), (1, 2, 2, 2), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 4, 1), (2, 2, 1, 2)]


def settings_of(mesh: tuple, microbatches: int = 1, update_len: int = UPDATE_LEN, **model) -> Settings:
    slices, data, sequence, heads = mesh
    return Settings(
        model=small_config(**(MODEL | model)),
        train=TrainSettings(batch_size=ROWS, update_len=update_len, num_steps=STEPS, microbatches=microbatches),
        optimizer=OptimizerSettings(learning_rate=0.01, warmup_steps=0, weight_decay=0.01),
        mesh=MeshSettings(slices=slices, data=data, sequence=sequence, model=heads),
    )


def mesh_of(settings: Settings) -> jax.sharding.Mesh:
    sizes = settings.mesh
    return make_mesh(sizes, jax.devices()[: sizes.slices * sizes.data * sizes.sequence * sizes.model])


def batches(sharding, n_steps: int = STEPS):
    rng, first_id = np.random.default_rng(0), 0
    for _ in range(n_steps):
        tokens = rng.integers(0, N_VOCAB, size=[2, ROWS, UPDATE_LEN]).astype(np.int32)
        doc_ids = first_id + np.sort(rng.integers(0, 3, size=[ROWS, UPDATE_LEN]), axis=1).astype(np.int32)
        mask = (rng.uniform(size=[ROWS, UPDATE_LEN]) < 0.9).astype(np.float32)
        yield jax.device_put(dict(inputs=tokens[0], targets=tokens[1], doc_ids=doc_ids, loss_mask=mask), sharding)
        first_id += 2  # some documents go on in the next update


@functools.cache
def start_alone(settings: Settings):
    """The state before the first step, made by one device."""
    return jax.device_get(create_train_state(settings, mesh_of(settings)))


def trained(settings: Settings, made_there: bool = False):
    """The state after 20 steps, and the metrics of each.

    made_there: whether the state is made on the mesh, where it must be compiled for, or by one device."""
    mesh = mesh_of(settings)
    if made_there:
        state = create_train_state(settings, mesh)
    else:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh))
        state = jax.device_put(start_alone(dataclasses.replace(settings, mesh=ALONE)), shardings)
    step_fn, metrics = make_train_step(settings, mesh), []
    for batch in batches(batch_sharding(mesh)):
        state, step_metrics = step_fn(state, batch)
        metrics.append(step_metrics)
    return state, jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone(eight_devices):
    """By head type: what one device gives."""
    return {name: trained(settings_of((1, 1, 1, 1), **model)) for name, model in HEADS.items()}


def assert_same(ours, others):
    (state, metrics), (other_state, other_metrics) = ours, others
    for a, b in zip(metrics, other_metrics, strict=True):
        assert a["grad_norm"] > 0.01
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)

    def same(path, a, b):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(same, state.params, other_state.params)
    jax.tree_util.tree_map_with_path(same, state.recurrent, other_state.recurrent)


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_parameters_codebooks_and_states_do_not_depend_on_the_mesh(alone, mesh):
    """Dropout and LayerDrop on, documents that go on over updates, positions that are masked."""
    assert_same(alone["shga"], trained(settings_of(mesh), made_there=True))


@pytest.mark.parametrize("heads", ["mqa", "mha"])
def test_heads_of_every_type_are_spread(alone, heads):
    assert_same(alone[heads], trained(settings_of((1, 2, 2, 2), **HEADS[heads])))


def test_a_window_of_several_blocks_and_no_cache_are_spread(eight_devices):
    model = dict(mem_len=6, agg_cache=False)
    (state, metrics), (other_state, other_metrics) = (
        trained(settings_of(mesh, **model)) for mesh in [(1, 1, 1, 1), (1, 2, 2, 2)]
    )
    # Not parameters: some relative biases here have next to no gradient, and Adam makes large steps of its noise.
    for a, b in zip(metrics, other_metrics, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), state.recurrent, other_state.recurrent)


def test_the_serial_reduction_goes_over_shards_too(alone):
    assert_same(alone["shga"], trained(settings_of((1, 1, 8, 1), reduction="serial")))


def test_parameters_that_are_whole_everywhere_train_alike(alone):
    settings = settings_of((1, 4, 1, 2))
    settings = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, fsdp=False))
    assert_same(alone["shga"], trained(settings, made_there=True))


def test_microbatches_add_up_to_the_batch(eight_devices):
    """Losses, gradients, the codebook's moving average and the states; without dropout, whose masks are others."""
    still = dict(p_dropemb=0.0, p_dropsin=0.0, p_dropres=0.0, p_droplyr=0.0)
    whole = trained(settings_of((1, 1, 1, 1), **still))
    assert_same(whole, trained(settings_of((1, 2, 2, 1), microbatches=4, **still)))


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
    for sizes in [(1, 1, 1, 1), (1, 1, 8, 1), (1, 1, 4, 2)]:
        settings = settings_of(sizes)
        mesh = mesh_of(settings)
        params = create_train_state(settings, mesh).params
        state, step = make_eval_state(settings, mesh, rows), make_eval_step(settings, mesh, rows)
        for ids, x in zip(doc_ids, tokens, strict=True):
            ones = np.ones(x.shape, np.float32)
            batch = dict(inputs=x, targets=np.roll(x, 1), doc_ids=ids, loss_mask=ones * (t % 5 > 0))
            state, sums = step(params, state, jax.device_put(batch, batch_sharding(mesh)))
        results.append(jax.device_get((state, sums)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), results[0], other)


def collectives_of(settings: Settings) -> dict:
    mesh = mesh_of(settings)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, settings.train.update_len), dtype, sharding=batch_sharding(mesh))
        for name, dtype in dict(inputs=jnp.int32, targets=jnp.int32, doc_ids=jnp.int32, loss_mask=jnp.float32).items()
    }
    compiled = make_train_step(settings, mesh).lower(abstract_train_state(settings, mesh), batch).compile()
    return {(c.kind, c.axes): c.bytes for c in Program(compiled.as_text()).collectives(mesh.shape.items())}


@pytest.mark.parametrize("n_vocab", [16, 40])
def test_what_shards_of_tokens_send_does_not_grow_with_the_update(n_vocab):
    """All-to-alls and halos of the scan over shards, and gradients, those of a wide vocabulary's block by block losses
    too: byte for byte."""
    few, many = (
        collectives_of(settings_of((1, 2, 4, 1), update_len=length, reduction="serial", n_vocab=n_vocab))
        for length in (48, 96)
    )
    assert few == many
    assert few["all-to-all", ("sequence",)] > 0


def test_layers_are_gathered_twice_and_nothing_else_is(eight_devices):
    """2 P over data: P, the bytes of the kernels as they are used, forward and again in the backward pass. The
    embeddings once each. Not a byte of activations."""
    model = dict(n_layer=2, d_model=32, d_v=64, remat="full", reduction="serial", pe_abs=False)
    settings = settings_of((1, 8, 1, 1), **model)
    params = abstract_train_state(settings, mesh_of(settings)).params
    stored = [
        (path, leaf.size * 4)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not leaf.sharding.is_fully_replicated
    ]
    in_layers = sum(size for path, size in stored if "layers" in jax.tree_util.keystr(path))
    others = sum(size for path, size in stored if "layers" not in jax.tree_util.keystr(path))
    sent = collectives_of(settings)
    assert in_layers > others > 0
    assert sent["all-gather", ("data",)] == 2 * in_layers + others


def test_gradients_cross_data_once_and_residuals_cross_model_four_times_a_unit(eight_devices):
    """At most: over data the bytes of all parameters once, whatever the vocabulary; over model, of a unit, the residual
    stream's sum forward, again in the backward pass, and its gradient, and the scores' gradient."""
    model = dict(n_layer=2, d_model=32, d_v=64, remat="full", reduction="serial", pe_abs=False, n_vocab=40)
    scalars = 1024
    settings = settings_of((1, 8, 1, 1), **model)
    params = abstract_train_state(settings, mesh_of(settings)).params
    sent = collectives_of(settings)
    assert sum(size for (kind, _), size in sent.items() if kind in ("all-reduce", "reduce-scatter")) <= scalars + sum(
        leaf.size * 4 for leaf in jax.tree.leaves(params)
    )
    residual = ROWS * UPDATE_LEN * 32 * 4
    sent = collectives_of(settings_of((1, 1, 1, 8), **model | dict(n_vocab=16)))
    assert {axes for _, axes in sent} == {("model",)}
    assert 3 * 4 * residual < sum(sent.values()) <= 4 * 4 * residual + scalars


def test_every_part_of_the_state_moves(alone):
    start = start_alone(settings_of((1, 1, 1, 1)))
    end, _ = alone["shga"]
    for path, before in jax.tree_util.tree_leaves_with_path((start.params, start.recurrent)):
        after = dict(jax.tree_util.tree_leaves_with_path((end.params, end.recurrent)))[path]
        assert np.abs(np.asarray(after, np.float32) - np.asarray(before, np.float32)).max() > 0, path
    assert int(end.step) == STEPS


def test_the_codebook_is_moved_by_its_average_and_not_by_the_optimizer(eight_devices):
    """With a learning rate of 0 weights stand still and codes move."""
    still = dataclasses.replace(
        settings_of((1, 1, 1, 1)), optimizer=OptimizerSettings(learning_rate=0.0, weight_decay=0.0)
    )
    mesh = mesh_of(still)
    batch = next(batches(batch_sharding(mesh)))
    before = start_alone(still).params
    after, _ = make_train_step(still, mesh)(jax.device_put(start_alone(still)), batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.params):
        moved = not np.array_equal(leaf, dict(jax.tree_util.tree_leaves_with_path(before))[path])
        assert moved == ("quantizer" in jax.tree_util.keystr(path)), path
