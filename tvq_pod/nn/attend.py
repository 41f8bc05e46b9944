"""Softmax attention for all blocks at once: each attends to its window, itself and its cache.

With the keys and values of these three concatenated, out = softmax(scores) @ values. The backward pass is hand-written
(as in FlashAttention, Dao et al., arXiv 2205.14135, section 3): it keeps the logarithm of each row's sum, and
recomputes the weights P from scores, which are matmuls of small arrays. With dO the gradient of the output,

    dV = P^T dO        dS = P * (dO V^T - sum(dO * out))        dq = dS k        dk = dS^T q

Shapes: R blocks of L, B rows, H key heads, G query heads for each, P columns of the window, S codes, K, V.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.scores import NEVER, RelativeBias, rows_and_columns


class Sources(NamedTuple):
    """One array for the window, one for the blocks themselves, and one for the cache, or None without a cache."""

    past: jax.Array
    present: jax.Array
    cache: jax.Array | None

    def map(self, function: Callable[..., jax.Array], *others: "Sources") -> "Sources":
        """Applies the function to each array that is not None."""
        past, present, cache = zip(self, *others, strict=True)
        return Sources(function(*past), function(*present), None if self.cache is None else function(*cache))

    def sum(self) -> jax.Array:
        """The sum of the arrays that are not None."""
        total = self.past + self.present
        return total if self.cache is None else total + self.cache


class Places(NamedTuple):
    """The arrays that decide which keys are visible. A key at distance d is in the query's document iff d is at most
    the query's position in the document."""

    positions: jax.Array  # int32 [R, B, L], in the document
    sees_cache: jax.Array | None  # bool [R, B, L]
    log_counts: jax.Array | None  # float32 [R, B, H, S]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(mem_len: int, q: jax.Array, bias: RelativeBias, keys: Sources, values: Sources, places: Places) -> jax.Array:
    """Computes attention. q: [R, B, H, G, L, K]. bias: for [R, B, H, G, L] queries. keys: past [R, B, H, P, K], present
    [R, B, H, L, K], cache [H, S, K]. values: the same with V, cache [R, B, H, S, V]. mem_len: M, at most P: columns of
    the window that are farther away are hidden. With a cache, the window's M columns and all of the block are visible;
    without, only keys at most M away.

    Returns [R, B, H, G, L, V] in the dtype of q; scores and sums are float32.
    """
    return _forward(mem_len, q, bias, keys, values, places)[0]


def _scores(mem_len, q, bias, keys, places) -> Sources:
    """The scores, float32 [R, B, H, G, L, .]; NEVER where a key is not visible."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    positions = places.positions[:, :, None, None, :, None]  # [R, B, 1, 1, L, 1]
    reach = positions if keys.cache is not None else jnp.minimum(positions, mem_len)
    block_len, width = q.shape[-2], keys.past.shape[-2]

    hidden = [(0, 0)] * (q.ndim - 1) + [(width - mem_len, 0)]
    past = dot("rbhglk,rbhpk->rbhglp", q, keys.past) + jnp.pad(bias.past(mem_len), hidden)
    distance, column = _distances(q, width, width)
    past = jnp.where((distance <= reach) & (column >= width - mem_len), past, NEVER)

    present = dot("rbhglk,rbhmk->rbhglm", q, keys.present) + bias.present()
    distance, _ = _distances(q, block_len, 0)
    present = jnp.where((distance <= reach) & (distance >= 0), present, NEVER)

    if keys.cache is None:
        return Sources(past, present, None)
    cache = dot("rbhglk,hsk->rbhgls", q, keys.cache) + places.log_counts[:, :, :, None, None, :]
    cache = jnp.where(places.sees_cache[:, :, None, None, :, None], cache, NEVER)
    return Sources(past, present, cache)


def _distances(q, width: int, first: int):
    """The distances of each query to each of `width` keys, the first of which is `first` tokens before the block; and
    the keys' columns. Int32 [1, 1, 1, 1, L, width]."""
    row, column = rows_and_columns(q.ndim, q.shape[-2], width)
    return first + row - column, column


def _forward(mem_len, q, bias, keys, values, places):
    scores = _scores(mem_len, q, bias, keys, places)
    top = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores if s is not None])
    weights = scores.map(lambda s: jnp.exp(s - top))
    total = weights.map(lambda w: jnp.sum(w, axis=-1, keepdims=True)).sum()
    weights = weights.map(lambda w: w.astype(q.dtype))
    # One matmul over window and block, one over the cache: fewer partial sums to move, and no copy of either operand.
    side_by_side = jnp.concatenate(weights[:2], axis=-1), jnp.concatenate(values[:2], axis=-2)
    out = jnp.einsum("rbhglm,rbhmv->rbhglv", *side_by_side).astype(jnp.float32)
    if values.cache is not None:
        out += jnp.einsum("rbhgls,rbhsv->rbhglv", weights.cache, values.cache)
    out = checkpoint_name((out / total).astype(q.dtype), "attended")
    log_total = checkpoint_name(top + jnp.log(total), "attended")
    return out, (q, bias, keys, values, places, out, log_total)


def _backward(mem_len, kept, d_out):
    q, bias, keys, values, places, out, log_total = kept
    dtype = q.dtype
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    scores = _scores(mem_len, q, bias, keys, places)
    weights = scores.map(lambda s: jnp.exp(s - log_total).astype(dtype))
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    d_values = weights.map(lambda w: jnp.einsum("rbhglm,rbhglv->rbhmv", w, d_out))
    d_scores = weights.map(
        lambda w, v: (w.astype(jnp.float32) * (dot("rbhglv,rbhmv->rbhglm", d_out, v) - delta)).astype(dtype), values
    )
    d_q = dot("rbhglp,rbhpk->rbhglk", d_scores.past, keys.past)
    d_q += dot("rbhglm,rbhmk->rbhglk", d_scores.present, keys.present)
    if keys.cache is not None:
        d_q += dot("rbhgls,hsk->rbhglk", d_scores.cache, keys.cache)
    d_past, d_present = (jnp.einsum("rbhglm,rbhglk->rbhmk", d, q) for d in (d_scores.past, d_scores.present))
    d_keys = Sources(d_past, d_present, None)

    width = keys.past.shape[-2]
    _, to_bias = jax.vjp(lambda bias: (bias.past(mem_len), bias.present()), bias)
    (d_bias,) = to_bias((
        d_scores.past[..., width - mem_len :].astype(jnp.float32), d_scores.present.astype(jnp.float32)
    ))  # fmt: skip
    return d_q.astype(dtype), d_bias, d_keys, d_values, None


attend.defvjp(_forward, _backward)
