"""The kernels' computations on one tile of queries, in shapes that suit a TPU's vector unit.

A tile is t queries of a block, from index `first` on. Its scores are three matrices, float32: window [t, L], block [t,
L] and cache [t, S]. Numbers that belong to a query are passed as a row [1, t] and used as a column [t, 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from tvq_pod.nn.pallas.call import COLUMNS, Shape
from tvq_pod.nn.scores import NEVER

LANES = 128


def chunks(width: int) -> list[slice]:
    """Slices of the columns of values, some at a time."""
    return [slice(begin, min(begin + COLUMNS, width)) for begin in range(0, width, COLUMNS)]


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes a @ b, float32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def dot_bt(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes a @ b.T, float32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def dot_at(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes a.T @ b, float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def as_column(row: jax.Array) -> jax.Array:
    """Transposes a row [1, n] to [n, 1], which the hardware can do for full lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))[:, :1]


def as_row(column: jax.Array) -> jax.Array:
    """Transposes a column [n, 1] to [1, n]."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]


def silu(x: jax.Array) -> jax.Array:
    """Computes x sigmoid(x), float32."""
    half = 0.5 * x.astype(jnp.float32)
    return half + half * jnp.tanh(half)


def silu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes x sigmoid(x), and its derivative, sigmoid(x) (1 + x (1 - sigmoid(x))); float32."""
    x = x.astype(jnp.float32)
    sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


def one_hot(shortcodes: jax.Array, n_code: int, dtype) -> jax.Array:
    """One-hot matrix [S, L], 1 where the token has the code, of shortcodes [1, L], -1 for none."""
    code = lax.broadcasted_iota(jnp.int32, (n_code, shortcodes.shape[1]), 0)
    return (code == shortcodes).astype(dtype)


class Scores(NamedTuple):
    """The score matrices of one tile: for the window, for the block, and for the cache, or None without a cache."""

    window: jax.Array
    block: jax.Array
    cache: jax.Array | None

    def there(self) -> list[jax.Array]:
        """The matrices that are not None."""
        return [scores for scores in self if scores is not None]


def places(shape: Shape, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices in the block of a tile's queries and of the block's keys, int32 [t, L] each."""
    size = shape.tile, shape.block_len
    return first + lax.broadcasted_iota(jnp.int32, size, 0), lax.broadcasted_iota(jnp.int32, size, 1)


def scores_of_tile(shape: Shape, ref, q_content, q_position, k_window, first) -> Scores:
    """Computes the scores of a tile. q_content, q_position [t, K]: queries plus u and plus v. k_window [L, K]. The
    other operands are those of the kernels: k, codes, by_distance, at_reach, positions, sees_cache, log_counts.

    The query at index a in its block sees distance d at column M + a - d of window and block, so row a of the biases by
    distance is rotated right by a: `by_distance` has distance -m mod L in row m, and `turn` does the rest.
    """
    turned = turn(shape, dot_bt(q_position, ref.by_distance[...]), first)
    farthest = jnp.sum(q_position.astype(jnp.float32) * ref.at_reach[...].astype(jnp.float32), axis=1, keepdims=True)
    if shape.window_bias:
        turned, farthest = turned + shape.window_bias, farthest + shape.window_bias
    query, key = places(shape, first)
    distance = query - key  # in the block; in the window, mem_len = block_len more
    position = as_column(ref.positions[...])

    bias = jnp.where(distance < 0, turned, jnp.where(distance == 0, farthest, 0.0))
    reach = position if shape.has_cache else jnp.minimum(position, shape.block_len)
    window = jnp.where(distance + shape.block_len <= reach, dot_bt(q_content, k_window) + bias, NEVER)
    block = dot_bt(q_content, ref.k[...]) + turned
    block = jnp.where((distance <= position) & (distance >= 0), block, NEVER)
    if not shape.has_cache:
        return Scores(window, block, None)
    cache = dot_bt(q_content, ref.codes[...]) + ref.log_counts[...]
    return Scores(window, block, jnp.where(as_column(ref.sees_cache[...]) > 0, cache, NEVER))


def turn(shape: Shape, x: jax.Array, first: jax.Array) -> jax.Array:
    """Rotates row a of x [t, L], float32, right by first + a.

    TPUs from v5 on have an instruction for it. Others rotate all rows by each power of two, and each row takes the
    rotations that are bits of its a.
    """
    if shape.core.can_turn:
        return pltpu.roll(x, first, 1, stride=1, stride_axis=0)
    x = pltpu.roll(x, first, 1)
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in range((shape.tile - 1).bit_length()):
        x = jnp.where((row >> bit) & 1 == 1, pltpu.roll(x, (1 << bit) % shape.block_len, 1), x)
    return x


def turned_back(shape: Shape, d_turned: jax.Array, first: jax.Array) -> jax.Array:
    """Inverts the rotation in `scores_of_tile`, with the rows in reverse order: [t, L] float32 -> [t, L].

    `turn` rotates each row one step further right than the row before it. With the rows in reverse order, this is one
    step further left.
    """
    shift = lax.rem(2 * shape.block_len - first - shape.tile + 1, shape.block_len)
    return turn(shape, upside_down(shape, d_turned), shift)


def upside_down(shape: Shape, x: jax.Array) -> jax.Array:
    """Reverses the rows of x [t, n], float32: with a matmul, since there is no instruction for it. Exact in `dtype`."""
    row, column = (lax.broadcasted_iota(jnp.int32, (shape.tile, shape.tile), axis) for axis in (0, 1))
    flip = (row + column == shape.tile - 1).astype(shape.dtype)
    precision = lax.Precision.HIGHEST if shape.dtype == jnp.float32 else None
    return lax.dot_general(
        flip,
        x.astype(shape.dtype),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
