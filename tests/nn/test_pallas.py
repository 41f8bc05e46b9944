"""The kernels in interpret mode, against the plain implementation: outputs, states and every gradient."""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from tests.common import rngs_fixture, small_config
from tests.made_up import first_state
from tests.nn.pallas_cases import (
    N_ROWS,
    T,
    arrays_of,
    assert_equal,
    compiled,
    core_config,
    documents,
    two_updates,
)
from tvq_pod.config.settings import MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.pallas.fit import shape_of, sized
from tvq_pod.nn.pallas.forward import forward_operands
from tvq_pod.nn.state import initial_state
from tvq_pod.nn.types import VQSpec
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.training.step import make_train_step

borders_of_rows = st.lists(st.lists(st.integers(1, 2 * T - 1), max_size=4), min_size=N_ROWS, max_size=N_ROWS)


@pytest.mark.slow(8)
@pytest.mark.parametrize(
    "changes",
    [
        dict(n_head=1),
        dict(head_type="mqa", n_head=3, window_bias=1.5),
        dict(grad_thru_cache=False),
    ],
    ids=str,
)
@settings(max_examples=6, deadline=None)
@given(borders=borders_of_rows, seed=st.integers(0, 9))
def test_kernels_give_what_the_plain_implementation_gives_wherever_documents_are_cut(changes, borders, seed):
    for found, expected in two_updates(core_config(**changes), borders, seed):
        assert_equal(found, expected)


@pytest.mark.slow(6)
@pytest.mark.parametrize(
    ("heads", "grad_thru_cache", "agg_cache"),
    [  # of head types and these two settings, each pair of values that is not among those above
        (dict(n_head=2), True, False),
        (dict(head_type="mqa"), False, False),
        (dict(head_type="mha", n_head=3), True, True),
        (dict(head_type="mha", n_head=3, window_bias=2.0), False, False),
    ],
    ids=str,
)
def test_kernels_give_what_the_plain_implementation_gives_for_every_head_type(heads, grad_thru_cache, agg_cache):
    config = core_config(**heads, grad_thru_cache=grad_thru_cache, agg_cache=agg_cache)
    for borders in ([[5, 13], [8]], [[5], []]):
        for found, expected in two_updates(config, borders):
            assert_equal(found, expected)


@pytest.mark.slow
def test_a_block_without_halves_is_one_tile_and_one_block_is_an_update():
    config = small_config(block_len=3, mem_len=3, d_v=7, n_head=1, attention="pallas")
    one, several = (shape_of(c, "cpu", (1, 1, 1, 1, c.block_len, c.d_k), c.d_v, True) for c in (config, core_config()))
    one, several = (sized(shape, forward_operands, {}) for shape in (one, several))
    assert one.n_tiles == 1 < several.n_tiles
    assert one.n_parts == 1 < several.n_parts
    arrays = arrays_of(config, 0)
    first = {name: x[:1] if name in ("q", "k_hat", "v", "gate") else x for name, x in arrays["differentiated"].items()}
    given = dict(differentiated=first, codes=arrays["codes"], z=arrays["z"][:1])
    given |= dict(doc_ids=np.array([[[0, 0, 1], [0, 0, 0]]], np.int32), state=initial_state(config, N_ROWS))
    assert_equal(compiled(config)(**given), compiled(config.replace(attention="plain"))(**given))


@pytest.mark.slow
def test_kernels_in_bfloat16_are_as_near_to_float32_as_the_plain_implementation():
    config = core_config(n_head=1, dtype=jnp.bfloat16)
    exactly = config.replace(attention="plain", dtype=jnp.float32)
    for seed in range(3):
        arrays, doc_ids = arrays_of(config, seed), documents([[5], [8]])[0]
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
        exact = compiled(exactly)(**wide, doc_ids=doc_ids, state=initial_state(exactly, N_ROWS))
        for kind in ("plain", "pallas"):
            of_kind = config.replace(attention=kind)
            found = compiled(of_kind)(**arrays, doc_ids=doc_ids, state=initial_state(config, N_ROWS))
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True):
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                name = kind + jax.tree_util.keystr(path)
                error, size = np.sqrt(np.mean(np.square(a - b))), np.sqrt(np.mean(np.square(b)))
                assert error <= 0.02 * size, f"{name}: {error / size:.4f}"


@functools.cache
def traced_gradient(**changes) -> list[tuple[str, list]]:
    """The kernels in the gradient of a whole model, by name, with the types of what they return."""
    config = small_config(attention="pallas", n_layer=3, is_train=True, **changes)
    tokens = jnp.zeros([2, T], jnp.int32)
    state = jax.eval_shape(lambda: Transformer.initial_state(config, 2))
    spec = VQSpec(jnp.ones([2, T]))

    def loss(params, state):
        applied = Transformer(config).apply(
            dict(params=params), state, tokens, tokens, spec, tokens, rngs=rngs_fixture()
        )
        new_state, out = cast(tuple[dict, dict], applied)
        return jnp.sum(out["losses"]) + out["l_codebook"], new_state

    init = functools.partial(Transformer(config.replace(is_train=False)).init, jax.random.key(0))
    params = jax.eval_shape(lambda state: init(state, tokens, tokens)["params"], state)
    jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(nn.meta.unbox(params), state)
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append((equation.params["name"], [out.aval for out in equation.outvars]))
            else:
                for inner in jaxprs_in_params(equation.params):
                    look(inner)

    look(jaxpr.jaxpr)
    return found


@pytest.mark.parametrize("remat", ["none", "projections", "dots", "full"])
@pytest.mark.slow
def test_the_forward_kernel_runs_again_only_where_nothing_is_kept(remat):
    names = [name for name, _ in traced_gradient(remat=remat)]
    units = 2  # of a layer; the scan has each once
    assert names.count("tvq_backward") == names.count("tvq_caches") == units
    assert names.count("tvq_forward") == (2 if remat == "full" else 1) * units


def test_training_makes_no_gradient_of_the_state():
    (outputs, _) = (avals for name, avals in traced_gradient(remat="projections") if name == "tvq_backward")
    means = small_config().n_code, small_config().d_v
    assert not any(aval.shape[-2:] == means for aval in outputs)


@pytest.mark.slow(15)
def test_a_run_goes_on_with_the_kernels_from_where_it_was_without_them(eight_devices):
    """Two steps by xla, and a third by each: one loss, one state; what is saved has the same tree."""
    mesh, rng = make_mesh(MeshSettings(), eight_devices[:1]), np.random.default_rng(0)

    def settings_of(attention):
        model = core_config(n_head=1, n_layer=1, remat="projections", p_dropsin=0.2).replace(attention=attention)
        optimizer = OptimizerSettings(learning_rate=0.01, warmup_steps=0)
        return Settings(model=model, train=TrainSettings(batch_size=N_ROWS, update_len=T), optimizer=optimizer)

    def batch():
        tokens = rng.integers(0, 11, size=[2, N_ROWS, T]).astype(np.int32)
        doc_ids = np.sort(rng.integers(0, 2, size=[N_ROWS, T]), axis=1).astype(np.int32)
        mask = np.ones([N_ROWS, T], np.float32)
        return jax.device_put(dict(inputs=tokens[0], targets=tokens[1], doc_ids=doc_ids, loss_mask=mask))

    by_xla, by_kernels = (make_train_step(settings_of(attention), mesh) for attention in ("xla", "pallas"))
    state = first_state(settings_of("xla"), mesh)
    for _ in range(2):
        state, _ = by_xla(state, batch())
    last, copy = batch(), jax.tree.map(jnp.copy, state)  # a step takes its state
    expected, expected_metrics = by_xla(state, last)
    found, metrics = by_kernels(copy, last)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found.recurrent), jax.tree.leaves(expected.recurrent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)
