"""The attention core on small random arrays, by the kernels in interpret mode and by the plain implementation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tests.common import small_config
from tvq_pod.nn.pallas.core import fused_attention
from tvq_pod.nn.plain import plain_attention
from tvq_pod.nn.state import initial_state
from tvq_pod.nn.types import TransformerConfig

N_ROWS, N_BLOCKS, BLOCK_LEN = 2, 3, 4
T = N_BLOCKS * BLOCK_LEN


def core_config(**changes) -> TransformerConfig:
    return small_config(block_len=BLOCK_LEN, mem_len=BLOCK_LEN, attention="pallas", **changes)


def arrays_of(config: TransformerConfig, seed: int, n_blocks: int = N_BLOCKS) -> dict:
    """Random queries, keys, values, gates, codes and biases of an update."""
    c, rng = config, np.random.default_rng(seed)
    heads = c.n_key_head, c.n_head // c.n_key_head
    shapes: dict[str, tuple[int, ...]] = dict(
        q=(n_blocks, N_ROWS, *heads, c.block_len, c.d_k),
        k_hat=(n_blocks, N_ROWS, c.n_key_head, c.block_len, c.d_k),
        v=(n_blocks, N_ROWS, c.n_key_head, c.block_len, c.d_v),
        u=(c.n_head, c.d_k),
        v_bias=(c.n_head, c.d_k),
        r=(c.n_key_head, c.mem_len + 1, c.d_k),
    )
    if c.head_type == "shga":
        shapes["gate"] = (*shapes["q"][:-1], c.d_v)
    arrays = {name: jnp.asarray(rng.normal(size=shape), c.dtype) for name, shape in shapes.items()}
    codes = jnp.asarray(rng.normal(size=(c.n_key_head, c.n_code, c.d_k)), c.dtype)
    z = rng.integers(0, c.n_code, size=shapes["k_hat"][:-1]).astype(np.int32)
    return dict(differentiated=arrays, codes=codes, z=z)


def attended(config: TransformerConfig, x: dict, codes, z, doc_ids, state: dict) -> tuple[jax.Array, dict]:
    """By the implementation that `config.attention` names; the plain one has SiLU and gate around it."""
    c, gate = config, x.get("gate")
    biases = dict(u=x["u"], v=x["v_bias"], r=x["r"], codes=codes)
    present = dict(z=z, k_hat=x["k_hat"], v=x["v"], doc_ids=doc_ids)
    if c.attention == "pallas":
        return fused_attention(c, biases, x["q"], present, gate, state)
    biases |= {name: biases[name].reshape(c.n_key_head, -1, c.d_k) for name in ("u", "v")}
    if gate is None:
        return plain_attention(c, biases, x["q"], present, state)
    out, state = plain_attention(c, biases, x["q"], present | dict(v=jax.nn.silu(x["v"])), state)
    return out * jax.nn.silu(gate), state


@functools.cache
def compiled(config: TransformerConfig):
    """(differentiated, codes, z, doc_ids, state) -> output, next state, and the gradients of a fixed sum of both by all
    that is differentiated and by the state's keys, values and means."""

    def weighted(x):
        return jnp.sum(jnp.sin(1.0 + jnp.arange(x.size)).reshape(x.shape) * x.astype(jnp.float32))

    def loss(x, of_state, codes, z, doc_ids, state):
        state = state | dict(
            xlcache=state["xlcache"] | {name: of_state[name] for name in ("k_hat", "v")},
            aggcache=state["aggcache"] | dict(upper_div_lower=of_state["mean"]),
        )
        out, state = attended(config, x, codes, z, doc_ids, state)
        total = weighted(out)
        if config.grad_thru_cache:  # else what reaches the next update depends on where it is cut
            total += weighted(state["aggcache"]["upper_div_lower"]) + weighted(state["xlcache"]["v"])
        return total, (out, state)

    @jax.jit
    def run(differentiated, codes, z, doc_ids, state):
        of_state = {name: state["xlcache"][name] for name in ("k_hat", "v")}
        of_state["mean"] = state["aggcache"]["upper_div_lower"]
        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        gradients, (out, state) = grad(differentiated, of_state, codes, z, doc_ids, state)
        return dict(out=out, state=state, gradients=gradients)

    return run


def documents(borders: list[list[int]], n_blocks: int = N_BLOCKS) -> np.ndarray:
    """A row for each list of places where a document begins: ids of two updates, [2, R, B, L]."""
    places = np.arange(2 * n_blocks * BLOCK_LEN)
    ids = [np.searchsorted(np.unique(row), places, side="right") for row in borders]
    return np.stack(ids).astype(np.int32).reshape(N_ROWS, 2, n_blocks, BLOCK_LEN).transpose(1, 2, 0, 3)


def two_updates(
    config: TransformerConfig,
    borders: list[list[int]],
    seed: int = 0,
    n_blocks: int = N_BLOCKS,
    run: Callable | None = None,
):
    """Both implementations on two updates, each from the state that the plain one left: pairs (kernels, plain). run:
    the kernels; those of one device if it is left out."""
    state, run = initial_state(config, N_ROWS), run or compiled(config)
    for number, doc_ids in enumerate(documents(borders, n_blocks)):
        arrays = arrays_of(config, seed + number, n_blocks)
        expected = compiled(config.replace(attention="plain"))(**arrays, doc_ids=doc_ids, state=state)
        yield run(**arrays, doc_ids=doc_ids, state=state), expected
        state = expected["state"]


def assert_equal(found: dict, expected: dict) -> None:
    """To the rounding of float32."""
    assert np.abs(expected["gradients"][0]["q"]).max() > 1e-3
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))
