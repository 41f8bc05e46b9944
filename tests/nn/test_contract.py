"""The contract of VQAttention, by the very calls that the tests of the paper's own implementation make.

Those are in github.com/transformer-vq/transformer_vq, tests/nn/test_attn.py; what they require is listed in
`VQAttention`'s docstring. Here the plain implementation is held to it, in forward mode too, and the fast ones are held
to the Jacobians in reverse mode. Tests that request `rng_fixture` run with 64-bit types on, as the original ones do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import common
from tests.common import DTYPES, FAST, WIDENINGS, gen_len_tuples
from tvq_pod.nn.attn import VQAttention

T = 12
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.__name__)
def dtype(request):
    return request.param


@functools.cache
def compiled(config, method):
    """`VQAttention.<method>` of a config, for any parameters, as one compiled function of keyword arguments."""

    def call(params, kwargs):
        return VQAttention(config).apply({"params": params}, **kwargs, method=getattr(VQAttention, method))

    return jax.jit(call)


def inputs_of(x, spec):
    return dict(input_features=x, doc_ids=jnp.ones(x.shape[:2], jnp.int32), vq_spec=spec)


def test_exp_of_the_biases_is_the_counts(rng_fixture):
    counts = jnp.arange(1024)
    assert counts.dtype == jnp.int64
    biases = VQAttention.get_agg_biases(counts)
    np.testing.assert_allclose(jnp.exp(biases), counts)
    scores = jax.random.normal(rng_fixture(0), shape=[1024])
    np.testing.assert_allclose(jnp.exp(scores + biases), counts * jnp.exp(scores))
    for narrow in (jnp.int32, jnp.float32):
        np.testing.assert_allclose(jnp.exp(VQAttention.get_agg_biases(counts.astype(narrow))), counts, rtol=1e-5)


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("attention", "agg_cache", "widening"),
    [
        ("plain", True, max(WIDENINGS)),
        *(slow("plain", False, widening) for widening in WIDENINGS),
        *(slow(fast, agg_cache, 1) for fast in FAST for agg_cache in (True, False)),
    ],
)
def test_outputs_are_causal(
    rng_fixture, attn_fixture, transformer_config_fixture, basic_vq_spec_fixture, widening, agg_cache, attention, dtype
):
    config = transformer_config_fixture(
        block_len=10,
        mem_len=10,
        agg_cache=agg_cache,
        widening=widening,
        dtypes=dtype,
        is_train=True,
        attention=attention,
    )
    cls, params = attn_fixture(config)
    assert cls is VQAttention
    state = cls.initial_state(config, batch_size=1)

    def call(x):
        features = jnp.pad(x[None, ..., None], ((0, 0), (0, 0), (0, config.d_model - 1)))
        _, out = cls(config).apply(
            {"params": params},
            state=state,
            input_dict=inputs_of(features, basic_vq_spec_fixture(batch_size=1, block_len=10)),
            rngs=dict(ephemeral=rng_fixture(1), timeless=rng_fixture(2)),
        )
        return out["res"][0, :, 0]

    x = jax.random.normal(rng_fixture(0), [10], dtype=config.dtype)
    by_mode = [jax.jacfwd, jax.jacrev] if attention == "plain" else [jax.jacrev]
    jacobians = [np.asarray(jax.jit(mode(call))(x)) for mode in by_mode]
    for jacobian in jacobians:
        np.testing.assert_allclose(jacobian, np.tril(jacobian), atol=1e-9, rtol=1e-9)
        assert np.abs(jacobian).max() > 1e-4
        np.testing.assert_allclose(jacobian, jacobians[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow(2)
def test_rows_may_be_mapped_over(rng_fixture, attn_fixture):
    """vmap over parameters of two layers is the two layers."""
    config = common.small_config(attention="plain")
    cls, params = attn_fixture(config)
    two = jax.tree.map(lambda x: jnp.stack([x, x * 1.5]), params)
    x = jax.random.normal(rng_fixture(0), [1, 8, config.d_model], config.dtype)

    def call(params):
        return cls(config).apply({"params": params}, cls.initial_state(config, 1), inputs_of(x, None))[1]["res"]

    mapped = jax.jit(jax.vmap(call))(two)
    for index in range(2):
        alone = jax.jit(call)(jax.tree.map(lambda x, index=index: x[index], two))
        np.testing.assert_allclose(mapped[index], alone, atol=1e-5)


# Widths do not enter the cutting into blocks: all lengths with one width, some with the other.
FORWARD = [(T, 4, 6, 2), slow(T, 3, 2, 2)] + [slow(*lengths, 1) for lengths in gen_len_tuples("tlm", T)]


@pytest.mark.slow(1)
@pytest.mark.parametrize("agg_cache", [True, False])
@pytest.mark.parametrize(("sequence_len", "block_len", "mem_len", "widening"), FORWARD)
def test_outputs_do_not_depend_on_blocks(
    rng_fixture,
    attn_fixture,
    transformer_config_fixture,
    basic_vq_spec_fixture,
    sequence_len,
    block_len,
    mem_len,
    widening,
    agg_cache,
    dtype,
):
    def config_of(block_len):
        return transformer_config_fixture(
            block_len=block_len,
            mem_len=mem_len,
            agg_cache=agg_cache,
            widening=widening,
            dtypes=dtype,
            is_train=True,
        )

    cls, params = attn_fixture(config_of(sequence_len))
    x = jax.random.normal(rng_fixture(0), [3, sequence_len, config_of(1).d_model], dtype=dtype)
    rngs = dict(ephemeral=rng_fixture(1), timeless=rng_fixture(2))

    def in_blocks(length):
        config, outs = config_of(length), []
        state = cls.initial_state(config=config, batch_size=3)
        for begin in range(0, sequence_len, length):
            spec = basic_vq_spec_fixture(batch_size=3, block_len=length)
            inputs = inputs_of(x[:, begin : begin + length, :], spec)
            state, out = compiled(config, "__call__")(params, dict(state=state, input_dict=inputs, rngs=rngs))
            outs.append(out["res"])
        return jnp.concatenate(outs, axis=1)

    expected, actual = in_blocks(sequence_len), in_blocks(block_len)
    assert actual.shape == expected.shape == x.shape
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, atol=5e-4, rtol=5e-3)


@pytest.mark.slow(1)
@pytest.mark.parametrize("agg_cache", [True, False])
@pytest.mark.parametrize(
    ("sequence_len", "mem_len"),
    [(T, mem_len) if mem_len == 4 else slow(T, mem_len) for _, mem_len in gen_len_tuples("tm", T)],
)
def test_gradients_do_not_depend_on_blocks(
    rng_fixture,
    attn_fixture,
    transformer_config_fixture,
    basic_vq_spec_fixture,
    sequence_len,
    mem_len,
    agg_cache,
    dtype,
):
    """The Jacobian of the second half by its queries is the same in one block and in two."""
    whole = transformer_config_fixture(
        block_len=sequence_len,
        mem_len=mem_len,
        agg_cache=agg_cache,
        widening=1,
        dtypes=dtype,
        is_train=True,
    )
    halves, half = whole.replace(block_len=sequence_len // 2), sequence_len // 2
    cls, params = attn_fixture(whole)
    shapes = dict(q=whole.d_k, k=whole.d_k, v=whole.d_v)
    q, k, v = (
        jax.random.normal(rng_fixture(seed), [1, whole.n_head, sequence_len, width], dtype)
        for seed, width in enumerate(shapes.values(), start=1)
    )
    pads = ((0, 0), (whole.n_head - 1, 0), (0, 0), (whole.d_k - 1, 0))
    rngs = dict(ephemeral=rng_fixture(1), timeless=rng_fixture(2))

    @functools.partial(jax.jit, static_argnums=0)
    def jacobian(config, x, k, v, state):
        """The Jacobian by x of the last head's last value, and all that attn returns."""

        def call(x):
            out = cls(config).apply(
                {"params": params},
                present_q=jnp.pad(x[None, None, ..., None], pads),
                present_k=k,
                present_v=v,
                present_doc_ids=jnp.ones([1, len(x)], dtype=jnp.int32),
                state=state,
                vq_spec=basic_vq_spec_fixture(batch_size=1, block_len=len(x)),
                rngs=rngs,
                method=cls.attn,
            )
            return out["attn_out"][0, :, -1], out

        return jax.jacrev(call, has_aux=True)(x)

    x = q[0, -1, :, -1]
    expected, _ = jacobian(whole, x, k, v, cls.initial_state(config=whole, batch_size=1))
    expected = expected[half:, half:]
    first = cls.initial_state(config=halves, batch_size=1)
    _, out = jacobian(halves, x[:half], k[..., :half, :], v[..., :half, :], first)
    recent = {name: out[name] for name in ("recent_z", "recent_k_hat", "recent_v", "recent_doc_ids")}
    midway = compiled(halves, "update_state")(params, recent | dict(state=first))
    actual, _ = jacobian(halves, x[half:], k[..., half:, :], v[..., half:, :], midway)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow(1)
@pytest.mark.parametrize("agg_cache", [True, False])
def test_documents_do_not_see_each_other(rng_fixture, attn_fixture, agg_cache):
    """Two documents back to back give what each gives alone, from a fresh state."""
    config = common.small_config(attention="plain", agg_cache=agg_cache, block_len=3, mem_len=2)
    cls, params = attn_fixture(config)
    x = jax.random.normal(rng_fixture(0), [1, T, config.d_model], config.dtype)

    def outputs(x, doc_ids):
        inputs = dict(input_features=x, doc_ids=doc_ids, vq_spec=None)
        return compiled(config, "__call__")(params, dict(state=cls.initial_state(config, 1), input_dict=inputs))[1]

    for border in range(1, T):
        together = outputs(x, jnp.where(jnp.arange(T)[None] < border, 4, 7).astype(jnp.int32))["res"]
        second = jnp.roll(x, -border, axis=1)  # What stands after a document's end cannot matter.
        alone = [outputs(part, jnp.full([1, T], 7, jnp.int32))["res"] for part in (x, second)]
        np.testing.assert_allclose(together[:, :border], alone[0][:, :border], atol=1e-5)
        np.testing.assert_allclose(together[:, border:], alone[1][:, : T - border], atol=1e-5)
