"""The loop over layers that goes with the kernels, against flax's scan with attention by XLA."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.common import model_params, rngs_fixture, small_config
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig, VQSpec

N_ROWS, T, N_LAYER = 2, 12, 2
DROPOUT = dict(is_train=True, p_dropsin=0.2, p_dropres=0.3, p_droplyr=0.2)


def batch_of(config: TransformerConfig) -> dict:
    rng = np.random.default_rng(0)
    shape = N_ROWS, T
    doc_ids = np.cumsum(rng.random(shape) < 0.15, axis=1).astype(np.int32)
    doc_ids[0] = 0  # a row that goes on in the next update
    return dict(
        inputs=rng.integers(4, config.n_vocab, shape),
        doc_ids=doc_ids,
        mask=(rng.random(shape) < 0.9).astype(np.float32),
        targets=rng.integers(4, config.n_vocab, shape),
    )


def loss_of(config: TransformerConfig, params, state, *, over_state: bool, inputs, doc_ids, mask, targets):
    tokens = inputs, doc_ids, VQSpec(mask), targets
    applied = Transformer(config).apply(dict(params=params), state, *tokens, rngs=rngs_fixture())
    new_state, out = cast(tuple[dict, dict], applied)
    loss = jnp.mean(out["losses"] * mask) + 0.1 * out["l_commit"] + out["l_codebook"]
    if over_state:
        means = [new_state[name]["aggcache"]["upper_div_lower"] for name in config.attention_units]
        loss += sum(jnp.sum(jnp.square(mean)) for mean in means)
    return loss, (new_state, out)


@functools.cache
def two_updates(over_state: bool = False, **changes) -> dict:
    """Gradients, states and results of the second of two updates; over_state: gradients reach through states, too."""
    config = small_config(n_layer=N_LAYER, **(dict(remat="projections") | DROPOUT | changes))
    params, state, batch = model_params(config), Transformer.initial_state(config, N_ROWS), batch_of(config)
    argnums = (0, 1) if over_state else 0
    function = functools.partial(loss_of, config, over_state=over_state, **batch)
    run = jax.jit(jax.grad(function, argnums, has_aux=True, allow_int=True))
    _, (state, _) = run(params, state)
    gradients, (state, out) = run(params, state)
    return dict(gradients=gradients, state=state, out=out)


def assert_same(found, expected, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        size = max(float(np.abs(a).max()), 1e-6)
        np.testing.assert_allclose(b / size, a / size, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(n_head=1), marks=pytest.mark.slow),
        pytest.param(dict(n_head=1, unroll=N_LAYER), marks=pytest.mark.slow),
        pytest.param(dict(head_type="mqa", n_head=2, remat="full"), marks=pytest.mark.slow),
        pytest.param(dict(head_type="mha", remat="full", agg_cache=False), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_gives_what_flaxs_scan_gives_with_the_same_masks(changes):
    """Losses, states and every gradient, with all kinds of dropout on."""
    of_loop = ("remat", "unroll")
    expected = two_updates(attention="xla", **{name: x for name, x in changes.items() if name not in of_loop})
    found = two_updates(attention="pallas", **changes)
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(unroll=N_LAYER)], ids=str)
def test_without_a_gradient_nothing_is_kept(changes):
    """Evaluation: losses and states as with one."""
    config = small_config(n_layer=N_LAYER, n_head=1, attention="pallas", **(DROPOUT | changes))
    state = Transformer.initial_state(config, N_ROWS)
    function = jax.jit(functools.partial(loss_of, config, over_state=False, **batch_of(config)))
    _, found = function(model_params(config), function(model_params(config), state)[1][0])
    expected = two_updates(attention="xla", n_head=1)
    assert_same(found, (expected["state"], expected["out"]))


@pytest.mark.slow
def test_gradients_reach_through_states_if_somebody_asks():
    """Those by keys, values and means; counts are counts, to the kernels."""
    of = {name: two_updates(attention=name, n_head=1, over_state=True)["gradients"] for name in ("pallas", "xla")}
    for unit in ("unit0", "unit1"):
        found, expected = (
            {**of[name][1][unit]["xlcache"], **of[name][1][unit]["aggcache"]} for name in ("pallas", "xla")
        )
        for name in ("k_hat", "v", "upper_div_lower"):
            assert np.abs(expected[name]).max() > 1e-3
            assert_same(found[name], expected[name])
    assert_same(of["pallas"][0], of["xla"][0])


def kernels_of(**changes) -> list[tuple[str, list, list]]:
    """Of a training step's gradient: each kernel's name, shapes of its operands, and of its results."""
    config = small_config(attention="pallas", n_layer=N_LAYER, n_head=1, **(DROPOUT | changes))
    state = jax.eval_shape(lambda: Transformer.initial_state(config, N_ROWS))
    function = functools.partial(loss_of, config, over_state=False, **batch_of(config))
    jaxpr = jax.make_jaxpr(jax.grad(function, has_aux=True))(model_params(config), state)
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                shapes = [[x.aval.shape for x in ends] for ends in (equation.invars, equation.outvars)]
                found.append((equation.params["name"], *shapes))
            else:
                for inner in jaxprs_in_params(equation.params):
                    look(inner)

    look(jaxpr.jaxpr)
    return found


def test_kernels_read_and_write_stacks_so_that_no_layer_is_copied_out_of_them():
    """Values, gates, outputs and the state are as large as that."""
    config, n_blocks = small_config(n_head=1), T // 4
    values = N_LAYER, n_blocks, N_ROWS, 1, 4, config.d_v
    by_query = *values[:4], 1, *values[4:]
    v_window, mean = (N_LAYER, N_ROWS, 1, 4, config.d_v), (N_LAYER, N_ROWS, 1, config.n_code, config.d_v)
    found = kernels_of(remat="projections")
    names = [name for name, *_ in found]
    assert sorted(names) == sorted(["tvq_forward", "tvq_caches", "tvq_backward"] * 2)
    for name, taken, given in found:
        assert v_window in taken
        assert (mean in taken) == (name != "tvq_backward")
        assert values in taken
        if name == "tvq_forward":
            assert taken.count(by_query) == 2  # gate, and the stack that the output is written into
            assert by_query in given
            assert mean in given
        if name == "tvq_backward":
            assert taken.count(by_query) == 2  # gate and output


@pytest.mark.slow
def test_with_remat_full_nothing_is_kept_but_what_a_unit_is_given():
    found = kernels_of(remat="full")
    assert [name for name, *_ in found].count("tvq_forward") == 4
