"""What every implementation of attention must hold, fast ones with their hand-written gradients above all: causal,
invariant to blocks, exact for documents, equal to the plain implementation and to the quadratic softmax."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import (
    DTYPES,
    FAST,
    WIDENINGS,
    attend_in_blocks,
    attn_fixture,
    gen_len_tuples,
    quadratic_attention,
    random_qkv,
    rngs_fixture,
    small_config,
    transformer_config_fixture,
)
from tvq_pod.nn.attn import VQAttention
from tvq_pod.nn.cache import caches, initial_cache
from tvq_pod.nn.scores import NEVER, relative_bias, turn_rows
from tvq_pod.nn.types import VQSpec

T = 12
REDUCTIONS = ("cumulative", "serial")
one_doc = functools.partial(jnp.zeros, dtype=jnp.int32)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def layer_config(block_len, mem_len, agg_cache, widening=1, attention="auto"):
    return transformer_config_fixture(
        block_len=block_len,
        mem_len=mem_len,
        agg_cache=agg_cache,
        widening=widening,
        dtypes=DTYPES[0],
        is_train=True,
        attention=attention,
    )


@functools.cache
def compiled_attention(config):
    """attend_in_blocks, compiled once per config: (q, k, v, doc_ids) -> (state, attn_out)."""
    _, params = attn_fixture(config)
    return jax.jit(functools.partial(attend_in_blocks, config, params))


@functools.cache
def outputs_and_jacobians(attention, block_len, mem_len, agg_cache):
    """For one document of T tokens: the outputs [1, T, H * V]; the Jacobians of each position's summed output by the
    values [T, H, T, V] and of the second half's by the queries [T / 2, H, T, K]."""
    config = layer_config(block_len, mem_len, agg_cache, attention=attention)
    _, params = attn_fixture(config)

    def outputs(v, q, k):
        out = attend_in_blocks(config, params, q, k, v, one_doc([1, T]))[1]
        return jnp.sum(out[0], axis=-1), out

    def everything(q, k, v):
        by_position, pull_back, out = jax.vjp(functools.partial(outputs, k=k), v, q, has_aux=True)
        by_v, by_q = jax.vmap(pull_back)(jnp.eye(len(by_position)))
        return out, by_v[:, 0], by_q[T // 2 :, 0]

    arrays = random_qkv(config, 1, T)
    return [np.asarray(array) for array in jax.jit(everything)(**arrays)]


# mem_len, agg_cache and the block_lens that are held against one block. Every divisor of T is among both: shorter than
# the other, longer, equal, a multiple and none. The plain implementation is held to all of them in test_contract.py.
QUICK = [(4, True, (3,))]
LENGTHS = [
    (1, True, (1, 3)), (2, True, (4,)), (3, True, (2,)), (4, True, (4, 6)), (6, True, (1,)), (12, True, (3,)),
    (1, False, (4,)), (4, False, (3,)), (2, False, (2,)), (6, False, (1,)),
]  # fmt: skip
by_lengths = pytest.mark.parametrize(("mem_len", "agg_cache", "block_lens"), [*QUICK, *(slow(*row) for row in LENGTHS)])
by_attention = pytest.mark.parametrize("attention", FAST)


def test_every_length_is_among_them():
    divisors = {block_len for _, block_len, _ in gen_len_tuples("tlm", T)}
    assert {mem_len for mem_len, _, _ in LENGTHS} == divisors
    assert {T, *(block_len for _, _, block_lens in QUICK + LENGTHS for block_len in block_lens)} == divisors


@pytest.mark.slow(3)
@by_attention
@by_lengths
def test_a_token_sees_nothing_that_comes_after_it(mem_len, agg_cache, block_lens, attention):
    for block_len in (T, *block_lens):
        _, by_v, _ = outputs_and_jacobians(attention, block_len, mem_len, agg_cache)
        jacobian = by_v[:, 0, :, 0]  # [T, T], of the first head and value
        np.testing.assert_allclose(np.triu(jacobian, 1), 0.0, atol=1e-9)
        reach = T if agg_cache else mem_len
        seen = np.tril(np.ones([T, T], bool)) & ~np.tril(np.ones([T, T], bool), -reach - 1)
        assert (np.abs(jacobian[seen]) > 1e-8).all()
        np.testing.assert_allclose(jacobian[~seen], 0.0, atol=1e-9)


@by_attention
@by_lengths
def test_outputs_are_the_quadratic_softmax_for_every_block_len(mem_len, agg_cache, block_lens, attention):
    config = layer_config(T, mem_len, agg_cache)
    _, params = attn_fixture(config)
    expected = quadratic_attention(config, params, **random_qkv(config, 1, T), doc_ids=one_doc([1, T]))
    for block_len in (T, *block_lens):
        out, _, _ = outputs_and_jacobians(attention, block_len, mem_len, agg_cache)
        np.testing.assert_allclose(out, expected, atol=2e-5, err_msg=f"block_len={block_len}")


@by_attention
@by_lengths
def test_gradients_by_queries_do_not_depend_on_block_len(mem_len, agg_cache, block_lens, attention):
    _, _, one_block = outputs_and_jacobians(attention, T, mem_len, agg_cache)
    assert np.abs(one_block).max() > 1e-3
    for block_len in block_lens:
        _, _, by_q = outputs_and_jacobians(attention, block_len, mem_len, agg_cache)
        np.testing.assert_allclose(by_q, one_block, atol=1e-5, rtol=1e-4, err_msg=f"block_len={block_len}")


@pytest.mark.slow
def test_values_may_have_any_width():
    config = layer_config(4, 4, True, max(WIDENINGS))
    _, params = attn_fixture(config)
    arrays = random_qkv(config, 2, T)
    _, out = compiled_attention(config)(**arrays, doc_ids=one_doc([2, T]))
    np.testing.assert_allclose(out, quadratic_attention(config, params, **arrays, doc_ids=one_doc([2, T])), atol=2e-5)


@pytest.mark.parametrize(
    ("block_len", "mem_len"),
    [(2, 5), *(pytest.param(*row, marks=pytest.mark.slow) for row in [(1, 7), (6, 5), (6, 30), (12, 7)])],
)
def test_mem_len_need_not_fit_the_blocks(block_len, mem_len):
    arrays = random_qkv(small_config(), 2, T, seed=5)
    doc_ids = jnp.array([[0] * 5 + [1] * 7, [0] * 11 + [1]], jnp.int32)
    config = small_config(block_len=block_len, mem_len=mem_len, window_bias=1.5)
    _, params = attn_fixture(config)
    _, out = compiled_attention(config)(**arrays, doc_ids=doc_ids)
    expected = quadratic_attention(config, params, **arrays, doc_ids=doc_ids)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@functools.cache
def compiled_layer(config):
    """(state, x, doc_ids) -> (state, res) of the whole unit."""
    cls, params = attn_fixture(config)

    def apply(state, x, doc_ids):
        inputs = dict(input_features=x, doc_ids=doc_ids, vq_spec=None)
        state, out = cls(config).apply({"params": params}, state=state, input_dict=inputs, rngs=rngs_fixture())
        return state, out["res"]

    return jax.jit(apply)


@functools.cache
def layer_and_gradients(config):
    """The unit with its gradients, over T tokens at once or in updates of `step` tokens, the state carried:
    (x [1, T, D], doc_ids [1, T], step) -> (last state, res, gradients of a fixed sum by parameters and x)."""
    cls, params = attn_fixture(config)

    def run(params, x, doc_ids, step):
        def update(state, inputs):
            features, ids = inputs
            inputs = dict(input_features=features[None], doc_ids=ids[None], vq_spec=None)
            applied = cls(config).apply({"params": params}, state=state, input_dict=inputs)
            state, out = cast(tuple[dict, dict], applied)
            return state, (out["res"][0], out["l_codebook"])

        updates = x[0].reshape(-1, step, x.shape[-1]), doc_ids[0].reshape(-1, step)
        state, (res, l_codebook) = jax.lax.scan(update, cls.initial_state(config, 1), updates)
        res = res.reshape(x.shape).astype(jnp.float32)
        weights = jnp.sin(jnp.arange(res.size, dtype=jnp.float32)).reshape(res.shape)
        return jnp.sum(weights * res) + jnp.sum(l_codebook), (state, res)

    @functools.partial(jax.jit, static_argnums=2)
    def apply(x, doc_ids, step):
        grads, (state, res) = jax.grad(run, argnums=(0, 1), has_aux=True)(params, x, doc_ids, step)
        return state, res, grads

    return apply


@pytest.mark.parametrize(
    "changes",
    [
        slow(dict(mem_len=5)),
        slow(dict(reduction="serial", head_type="mqa")),
        slow(dict(block_len=2, mem_len=6, head_type="mha", n_head=3)),
        slow(dict(agg_cache=False, mem_len=5)),
        slow(dict(key_shift=True, head_type="mqa", n_head=3)),
        slow(dict(grad_thru_cache=False, window_bias=1.5, mem_len=1, n_head=1)),
    ],
    ids=str,
)
@settings(max_examples=8, deadline=None)
@given(borders=st.lists(st.integers(1, 11), max_size=3), seed=st.integers(0, 9))
def test_an_update_is_its_blocks_one_by_one_and_the_plain_implementation_gradients_too(changes, borders, seed):
    config = small_config(**(dict(block_len=4, mem_len=4) | changes))
    x = np.random.default_rng(seed).normal(size=[1, T, config.d_model]).astype(np.float32)
    doc_ids = np.searchsorted(np.unique(borders), np.arange(T), side="right").astype(np.int32)[None]
    at_once = layer_and_gradients(config)(x, doc_ids, T)
    one_by_one = layer_and_gradients(config)(x, doc_ids, config.block_len)
    plain = layer_and_gradients(config.replace(attention="plain"))(x, doc_ids, T)
    assert np.abs(at_once[2][1]).max() > 1e-3
    for other in (one_by_one, plain):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), at_once, other)


@pytest.mark.slow
def test_an_update_is_its_blocks_one_by_one_in_bfloat16():
    config = small_config(block_len=4, mem_len=4, dtype=jnp.bfloat16)
    x = np.random.default_rng(0).normal(size=[1, T, config.d_model]).astype(np.float32)
    doc_ids = np.array([[0] * 5 + [1] * 7], np.int32)
    at_once = layer_and_gradients(config)(x.astype(jnp.bfloat16), doc_ids, T)
    one_by_one = layer_and_gradients(config)(x.astype(jnp.bfloat16), doc_ids, 4)
    np.testing.assert_array_equal(at_once[0]["xlcache"]["z"], one_by_one[0]["xlcache"]["z"])  # else another function

    def near(a, b):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=0.02 * (np.abs(b).max() + 0.1))

    jax.tree.map(near, at_once, one_by_one)


def test_with_key_shift_a_key_holds_the_query_of_the_token_before():
    """The unit, from its input on, in NumPy: keys of whole documents, and a quadratic softmax."""
    config = small_config(block_len=3, mem_len=4, head_type="mqa", n_head=3, key_shift=True)
    _, params = attn_fixture(config)
    x = np.random.default_rng(0).normal(size=[1, T, config.d_model])
    doc_ids = np.array([[0] * 5 + [1] * 7], np.int32)

    def rms_norm(x):
        return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)

    h = rms_norm(x) * np.asarray(params["norm"]["scale"])
    q, k, v = (np.einsum("btd,hkd->bhtk", h, params[name]["kernel"]) for name in ("w_q", "w_k", "w_v"))
    for t in range(1, T):
        if doc_ids[0, t] == doc_ids[0, t - 1]:
            k[0, 0, t] += np.asarray(params["shift"])[0] * np.mean(q[0, :, t - 1], axis=0)
    q, k = (rms_norm(x) * config.d_k**-0.25 for x in (q, k))
    out = quadratic_attention(config, params, q, k, v, doc_ids)
    expected = out.reshape(1, T, -1) @ np.asarray(params["w_o"]["kernel"]).reshape(-1, config.d_model)
    _, res = compiled_layer(config)(VQAttention.initial_state(config, 1), x.astype(np.float32), doc_ids)
    np.testing.assert_allclose(res, expected, atol=2e-5)


@pytest.mark.parametrize(
    "changes", [slow(dict(head_type="mqa", n_head=3)), slow(dict(head_type="mqa")), dict(head_type="mha")], ids=str
)
def test_every_head_type_is_the_quadratic_softmax(changes):
    config = small_config(block_len=3, mem_len=4, **changes)
    _, params = attn_fixture(config)
    assert "w_g" not in params
    assert params["quantizer"]["codebook"].shape[0] == config.n_key_head == (1 if config.head_type == "mqa" else 2)
    arrays, doc_ids = random_qkv(config, 2, T), jnp.array([[0] * 5 + [1] * 7, [0] * 12], jnp.int32)
    _, out = compiled_attention(config)(**arrays, doc_ids=doc_ids)
    np.testing.assert_allclose(out, quadratic_attention(config, params, **arrays, doc_ids=doc_ids), atol=2e-5)


document_lengths = st.lists(st.integers(1, 14), min_size=1, max_size=6)


@pytest.mark.slow(2)
@settings(max_examples=30, deadline=None)
@given(lengths=document_lengths, window=st.sampled_from([(1, True), (3, True), (4, False)]))
def test_a_document_never_sees_its_neighbours(lengths, window):
    """Documents back to back in a stream give what each gives alone, from a fresh state."""
    mem_len, agg_cache = window
    config = small_config(block_len=4, mem_len=mem_len, agg_cache=agg_cache)
    layer, total = compiled_layer(config), 48
    lengths = [*lengths, max(total - sum(lengths), 0)]
    doc_ids = np.repeat(np.arange(len(lengths)), lengths)[:total].astype(np.int32)[None]
    x = np.random.default_rng(sum(lengths)).normal(size=[1, total, config.d_model]).astype(np.float32)
    _, together = layer(VQAttention.initial_state(config, 1), x, doc_ids)
    for doc_id in np.unique(doc_ids):
        (places,) = np.nonzero(doc_ids[0] == doc_id)
        alone_x = np.zeros_like(x)
        alone_x[0, : len(places)] = x[0, places]
        _, alone = layer(VQAttention.initial_state(config, 1), alone_x, np.zeros_like(doc_ids))
        np.testing.assert_allclose(np.asarray(together)[0, places], np.asarray(alone)[0, : len(places)], atol=2e-5)


compiled_caches = jax.jit(caches, static_argnums=2)


@pytest.mark.slow(1)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_cache_counts_and_averages_one_document(reduction, data):
    """`caches`, fed any runs of tokens, holds exactly the count and mean of the last document's, per code."""
    n_code, width, n_blocks, block_len = 3, 2, 4, 3
    per_update = n_blocks * block_len
    cache = initial_cache(1, 1, n_code, width)
    ids = np.cumsum(data.draw(st.lists(st.integers(0, 1), min_size=24, max_size=24))).astype(np.int32)
    z = np.array(data.draw(st.lists(st.integers(0, n_code - 1), min_size=24, max_size=24)))
    v = np.random.default_rng(0).normal(size=[24, width])
    for begin in range(0, 24, per_update):
        part = slice(begin, begin + per_update)
        leaving = dict(
            z=z[part].reshape(n_blocks, 1, 1, block_len),
            v=v[part].reshape(n_blocks, 1, 1, block_len, width).astype(np.float32),
            doc_ids=ids[part].reshape(n_blocks, 1, block_len),
        )
        before, cache = compiled_caches(cache, leaving, reduction)
        for block in range(1, n_blocks + 1):
            end = begin + block * block_len
            last = block == n_blocks
            lower = cache["lower"][0, 0] if last else before["lower"][block, 0, 0]
            mean = cache["upper_div_lower"][0, 0] if last else before["upper_div_lower"][block, 0, 0]
            assert (cache["latest_doc_id"][0] if last else before["latest_doc_id"][block, 0]) == ids[end - 1]
            for code in range(n_code):
                chosen = (ids[:end] == ids[end - 1]) & (z[:end] == code)
                assert lower[code] == chosen.sum()
                expected = v[:end][chosen].mean(axis=0) if chosen.any() else np.zeros(width)
                np.testing.assert_allclose(mean[code], expected, atol=1e-5)


@pytest.mark.slow
def test_a_count_beyond_bfloat16_still_grows():
    config = small_config(dtype=jnp.bfloat16, n_code=1, block_len=8, mem_len=8)
    _, params = attn_fixture(small_config(n_code=1))
    state = VQAttention.initial_state(config, 1)
    layer = jax.jit(
        lambda state, x: VQAttention(config).apply(
            {"params": params}, state, dict(input_features=x, doc_ids=one_doc([1, 64]), vq_spec=None)
        )[0]
    )
    for step in range(10):
        state = layer(state, jnp.ones([1, 64, config.d_model], jnp.bfloat16))
        assert state["aggcache"]["lower"][0, 0, 0] == 64 * (step + 1) - config.mem_len


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    arrays = random_qkv(small_config(), 2, T)
    doc_ids = one_doc([2, T])
    _, params = attn_fixture(small_config())
    # Keys on their codes: a rounded key must not choose another code, which would be another function.
    codes = params["quantizer"]["codebook"]
    z = jax.random.randint(jax.random.key(0), [2, 2, T], 0, codes.shape[1])
    arrays["k"] = jax.vmap(lambda z: jax.vmap(lambda c, i: c[i])(codes, z))(z)
    _, exact = compiled_attention(small_config())(**arrays, doc_ids=doc_ids)
    config = small_config(dtype=jnp.bfloat16)
    half = {name: array.astype(jnp.bfloat16) for name, array in arrays.items()}
    _, rough = attend_in_blocks(config, params, **half, doc_ids=doc_ids)
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.1)


@pytest.mark.slow(1)
@pytest.mark.parametrize("grad_thru_cache", [True, False])
def test_grad_thru_cache_decides_whether_gradients_cross_blocks(grad_thru_cache):
    config = small_config(block_len=4, mem_len=2, grad_thru_cache=grad_thru_cache)
    cls, params = attn_fixture(config)

    def second_block(x):
        inputs = dict(input_features=x, doc_ids=one_doc([1, T]), vq_spec=None)
        applied = cls(config).apply({"params": params}, cls.initial_state(config, 1), inputs)
        _, out = cast(tuple[dict, dict], applied)
        return jnp.sum(jnp.square(out["res"][:, 8:]))

    x = jax.random.normal(jax.random.key(0), [1, T, config.d_model])
    grad = np.abs(np.asarray(jax.jit(jax.grad(second_block))(x))).max(axis=(0, 2))
    assert (grad[8:] > 1e-4).all()
    if grad_thru_cache:
        assert (grad[:8] > 1e-6).all()  # 6, 7 by the window, 0 .. 5 by the cache
    else:
        assert (grad[:8] == 0).all()


@pytest.mark.parametrize("n_rows", [slow(1), 40])  # turned row by row, and by the shift theorem
@pytest.mark.parametrize(("block_len", "mem_len"), [(4, 8), (6, 4), (3, 5), (1, 6)])
def test_relative_biases_land_on_their_distance(block_len, mem_len, n_rows):
    rng = np.random.default_rng(0)
    q = rng.normal(size=[n_rows, 2, 1, block_len, 5]).astype(np.float32)
    r = rng.normal(size=[2, mem_len + 1, 5]).astype(np.float32)
    bias = jax.jit(relative_bias)(q, r)
    past, present = bias.past(mem_len), bias.present()
    for a in range(block_len):
        for column in range(mem_len + block_len):
            distance = mem_len + a - column
            if distance < 0:
                continue
            found = past[..., a, column] if column < mem_len else present[..., a, column - mem_len]
            expected = np.einsum("bhgk,hk->bhg", q[:, :, :, a], r[:, distance]) if distance <= mem_len else 0.0
            np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-5)


def test_rows_are_turned_by_their_own_place():
    x = np.random.default_rng(0).normal(size=[2, 3, 5])
    turned = np.asarray(turn_rows(jnp.array(x)))
    for a, j in np.ndindex(3, 5):
        np.testing.assert_allclose(turned[:, a, j], x[:, a, (a - j) % 5], rtol=1e-6)


def test_agg_biases_are_log_counts():
    counts = jnp.array([0.0, 1.0, 2.0, 1e6])
    biases = VQAttention.get_agg_biases(counts)
    assert biases[0] == NEVER
    np.testing.assert_allclose(jnp.exp(biases), counts, rtol=1e-5)


def test_positions_count_from_the_documents_start():
    config = small_config(block_len=4, mem_len=2)
    layer, state = compiled_layer(config), VQAttention.initial_state(config, 2)
    x = jnp.zeros([2, 8, config.d_model])
    state, _ = layer(state, x, jnp.array([[0] * 8, [0] * 3 + [1] * 5], jnp.int32))
    np.testing.assert_array_equal(state["pos_offset"], [8, 5])
    state, _ = layer(state, x, jnp.array([[0] * 8, [1] * 7 + [2]], jnp.int32))
    np.testing.assert_array_equal(state["pos_offset"], [16, 1])


def test_masked_positions_are_left_out_of_commit_loss_and_sums():
    config = small_config()
    cls, params = attn_fixture(config)
    x = jax.random.normal(jax.random.key(0), [1, 8, config.d_model])
    mask = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0]], jnp.float32)

    def losses(params, x, mask, length):
        inputs = dict(input_features=x, doc_ids=one_doc([1, length]), vq_spec=VQSpec(loss_mask=mask))
        _, out = VQAttention(config.replace(block_len=length)).apply(
            {"params": params}, cls.initial_state(config, 1), inputs
        )
        return out["l_codebook"], out["l_commit"]

    grad = jax.jit(jax.grad(losses, has_aux=True), static_argnums=3)
    masked, commit = grad(params, x, mask, 8)
    short, commit_short = grad(params, x[:, :5], mask[:, :5], 5)
    np.testing.assert_allclose(commit, commit_short, rtol=1e-5)
    for name in ("codebook", "count"):
        np.testing.assert_allclose(masked["quantizer"][name], short["quantizer"][name], atol=1e-5)
    assert masked["quantizer"]["count"].sum() == 5 * config.n_head


def test_block_len_must_divide_the_tokens_given():
    config = small_config(block_len=5)
    cls, params = attn_fixture(config)
    inputs = dict(input_features=jnp.zeros([1, 12, config.d_model]), doc_ids=one_doc([1, 12]), vq_spec=None)
    with pytest.raises(ValueError, match="block_len=5 does not divide the 12"):
        cls(config).apply({"params": params}, cls.initial_state(config, 1), inputs)
