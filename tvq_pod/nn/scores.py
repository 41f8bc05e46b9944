"""Relative biases: from the order of distances, in which they are computed, to the columns of a window and a block.

A query at index a in its block sees distance d at column M + a - d of the window and the block. So every row of the
biases by distance is rotated by its own a. TPUs are very slow at moving data by a different amount in every row, so the
rows are rotated by the Fourier shift theorem: with N = max(M, L) and r_d = sum_f R_f e^(2 pi i f d / N),

    q . r_{(a - j) mod N} = sum_f (q . R_f) e^(2 pi i f a / N) e^(-2 pi i f j / N)

which is two matmuls with an elementwise rotation between them. Compiled for v5e at L = M = 512, K = 128 in bfloat16,
for eight blocks forward and backward, this takes 53 us, while moving the rows by pad and reshape takes 1,150.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -1e30  # score of masked keys; finite, so that no difference of two is NaN


def rows_and_columns(n_axes: int, n_rows: int, n_columns: int) -> tuple[jax.Array, jax.Array]:
    """The indices of rows and of columns, int32 [1, ..., n_rows, n_columns] each; computed where they are used, not
    read from memory."""
    shape = (1,) * (n_axes - 2) + (n_rows, n_columns)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (n_axes - 2, n_axes - 1))
    return row, column


def as_last_axes(x, of):
    """Reshapes x, which has fewer axes than `of`, so that its axes align with the last ones of `of`."""
    return x.reshape((1,) * (of.ndim - x.ndim) + x.shape)


class RelativeBias(NamedTuple):
    """The relative biases of L queries.

    turned: float32 [..., L, N], with the bias of distance (a - j) mod N in column j, if that distance is below M or N
    exceeds M. at_reach: float32 [..., L], the bias of distance M; zeros if `turned` has it.
    """

    turned: jax.Array
    at_reach: jax.Array

    def past(self, mem_len: int) -> jax.Array:
        """The biases for the window, [..., L, M]: 0 where the distance exceeds M."""
        a, c = rows_and_columns(self.turned.ndim, self.turned.shape[-2], mem_len)
        bias = jnp.where(c >= a, self.turned[..., -mem_len:], 0.0)
        if self.turned.shape[-1] == mem_len:  # then distance M is in the place of distance 0
            bias = jnp.where(c == a, self.at_reach[..., None], bias)
        return bias

    def present(self) -> jax.Array:
        """The biases for the block itself, [..., L, L]; the caller masks the keys after a query."""
        return self.turned[..., : self.turned.shape[-2]]


def relative_bias(q: jax.Array, r: jax.Array, window_bias: float = 0.0) -> RelativeBias:
    """Computes the biases q . r_d + window_bias. q: [..., H, G, L, K], queries of blocks; r: [H, M + 1, K], by distance
    0 .. M.

    With few queries, rows are moved one by one, which is cheaper then; the result is the same up to rounding.
    """
    block_len, mem_len = q.shape[-2], r.shape[1] - 1
    period = max(mem_len, block_len)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if period == mem_len:
        at_reach, table = dot("...hglk,hk->...hgl", q, r[:, mem_len]), r[:, :mem_len]
    else:
        at_reach = jnp.zeros(q.shape[:-1], jnp.float32)
        table = jnp.pad(r, [(0, 0), (0, period - mem_len - 1), (0, 0)])
    n_queries = q.size // (q.shape[-4] * q.shape[-1])  # for each head's table
    if n_queries < period or period % 2:
        turned = turn_rows(dot("...hglk,hdk->...hgld", q, table))
    else:
        turned = _turned_by_frequency(q, table)
    if window_bias:
        at_reach += window_bias
        a, j = rows_and_columns(turned.ndim, block_len, period)
        # if N = M no distance is farther, and the comparison would cost 3 of 542 ms on a v5e (configs/enwik8.py)
        turned += window_bias if period == mem_len else jnp.where((a - j) % period <= mem_len, window_bias, 0.0)
    return RelativeBias(turned, at_reach)


def _turned_by_frequency(q: jax.Array, table: jax.Array) -> jax.Array:
    """Computes the rotated biases, float32 [..., H, G, L, N], of q [..., H, G, L, K] and r_d, table [H, N, K], by the
    shift theorem."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    basis, weights = _basis(table.shape[1])
    spectrum = jnp.einsum("fd,hdk->hfk", basis * weights, table.astype(jnp.float32), precision="highest")
    spectrum = spectrum.astype(q.dtype)
    half = len(basis) // 2
    by_cosine, by_sine = (dot("...hglk,hfk->...hglf", q, part) for part in (spectrum[:, :half], spectrum[:, half:]))
    turned = jnp.concatenate(_turned_coefficients(by_cosine, by_sine), axis=-1).astype(q.dtype)
    return dot("...f,fj->...j", turned, jnp.asarray(basis, q.dtype))


def turn_rows(by_distance: jax.Array) -> jax.Array:
    """Maps x [..., L, N] to y with y[..., a, j] = x[..., a, (a - j) mod N].

    Two copies of each reversed row are flattened, and read again with rows one element shorter: each row shifts one
    further to the right.
    """
    *lead, block_len, period = by_distance.shape
    twice = jnp.concatenate([by_distance[..., ::-1]] * 2, axis=-1).reshape(*lead, 2 * block_len * period)
    rows = jnp.pad(twice, [(0, 0)] * len(lead) + [(0, period)])[..., period - 1 :]
    width = 2 * period - 1
    return rows[..., : block_len * width].reshape(*lead, block_len, width)[..., :period]


@functools.cache
def _basis(period: int) -> tuple[np.ndarray, np.ndarray]:
    """The real Fourier basis, float32 [N, N], by frequency and index: cosines of frequencies 0 .. N / 2 - 1, then sines
    of the same; the cosine of frequency N / 2 takes the place of the sine of frequency 0, which is zero. Also the
    weights [N, 1] that make the basis its own inverse."""
    half = period // 2
    angles = 2 * np.pi * np.outer(np.arange(half), np.arange(period)) / period
    sines = np.sin(angles)
    sines[0] = np.cos(np.pi * np.arange(period))
    weights = np.full([period, 1], 2.0 / period)
    weights[[0, half]] = 1.0 / period
    return np.concatenate([np.cos(angles), sines]).astype(np.float32), weights.astype(np.float32)


def _turned_coefficients(by_cosine, by_sine):
    """Turns coefficients [..., L, N / 2] of functions of the distance d = a - j into those of functions of j."""
    block_len, half = by_cosine.shape[-2:]
    angles = np.outer(np.arange(block_len), np.pi * np.arange(half) / half)
    cos, sin = (as_last_axes(f(angles).astype(np.float32), by_cosine) for f in (np.cos, np.sin))
    # cos f(a - j) = cos fa cos fj + sin fa sin fj;  sin f(a - j) = sin fa cos fj - cos fa sin fj
    of_cosine, of_sine = by_cosine * cos + by_sine * sin, by_cosine * sin - by_sine * cos
    # of the two frequencies that share the first place, N / 2 alternates its sign
    sign = as_last_axes(np.where(np.arange(block_len) % 2, -1.0, 1.0).astype(np.float32)[:, None], by_sine)
    is_shared = as_last_axes(np.arange(half) == 0, by_sine)
    return jnp.where(is_shared, by_cosine, of_cosine), jnp.where(is_shared, by_sine * sign, of_sine)
