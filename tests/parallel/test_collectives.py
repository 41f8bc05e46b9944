"""What the compiled step sends over a mesh, byte for byte."""

import jax
import jax.numpy as jnp
import pytest

from tests.parallel.sharded import ROWS, UPDATE_LEN, mesh_of, settings_of
from tvq_pod.config.settings import Settings
from tvq_pod.parallel.sharding import batch_sharding
from tvq_pod.planning.hlo import Program
from tvq_pod.training.step import abstract_train_state, make_train_step

# Compiled for their traffic; the loop over two layers is in it.
TWO_LAYERS = dict(n_layer=2, d_model=32, d_v=64, remat="full", reduction="serial", pe_abs=False)
GRADIENTS = ("all-reduce", "reduce-scatter")


def collectives_of(settings: Settings) -> dict:
    """Bytes by kind and axes."""
    mesh = mesh_of(settings)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, settings.train.update_len), dtype, sharding=batch_sharding(mesh))
        for name, dtype in dict(inputs=jnp.int32, targets=jnp.int32, doc_ids=jnp.int32, loss_mask=jnp.float32).items()
    }
    compiled = make_train_step(settings, mesh).lower(abstract_train_state(settings, mesh), batch).compile()
    return {(c.kind, c.axes): c.bytes for c in Program(compiled.as_text() or "").collectives(mesh.shape.items())}


@pytest.mark.slow
@pytest.mark.parametrize("n_vocab", [16, 40])
def test_what_shards_of_tokens_send_does_not_grow_with_the_update(eight_devices, n_vocab):
    """All-to-alls and halos of the scan over shards, and gradients, those of a wide vocabulary's block by block losses
    too: byte for byte."""
    model = dict(reduction="serial", head_type="mqa", d_ff=16, n_vocab=n_vocab, n_layer=1)
    few, many = (collectives_of(settings_of((1, 2, 4, 1), model, update_len=length)) for length in (48, 96))
    assert few == many
    assert few["all-to-all", ("sequence",)] > 0


@pytest.mark.slow
def test_the_backward_pass_does_not_make_again_what_shards_begin_with(eight_devices):
    """With kernels: a cache's sums go to and fro once, their gradients once, and counts once."""
    settings = settings_of((1, 1, 4, 1), TWO_LAYERS | dict(attention="pallas", remat="projections"))
    of_unit = ROWS * settings.model.n_code * (4 * settings.model.d_v + 2) * 4
    assert collectives_of(settings)["all-to-all", ("sequence",)] == 4 * of_unit


def test_over_data_layers_are_gathered_twice_and_gradients_cross_once(eight_devices):
    """Gathered: 2 P, P being the bytes of the kernels as they are used, forward and again in the backward pass; the
    embeddings once each; not a byte of activations. Of gradients, at most the bytes of all parameters once, though the
    vocabulary is so wide that its losses go block by block."""
    settings = settings_of((1, 8, 1, 1), TWO_LAYERS | dict(head_type="mqa", d_ff=64, n_vocab=40))
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
    scalars = 1024
    assert sum(size for (kind, _), size in sent.items() if kind in GRADIENTS) <= scalars + sum(
        leaf.size * 4 for leaf in jax.tree.leaves(params)
    )


@pytest.mark.slow
def test_residuals_cross_model_four_times_a_unit(eight_devices):
    """At most: of a unit, the residual stream's sum forward, again in the backward pass, and its gradient, and the
    scores' gradient."""
    residual, scalars = ROWS * UPDATE_LEN * 32 * 4, 1024
    sent = collectives_of(settings_of((1, 1, 1, 8), TWO_LAYERS))
    assert {axes for _, axes in sent} == {("model",)}
    assert 3 * 4 * residual < sum(sent.values()) <= 4 * 4 * residual + scalars
