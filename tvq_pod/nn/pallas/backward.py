"""The backward kernel: it processes blocks from the last to the first, and recomputes the weights from the logarithm of
their sum.

With P a query's weights, dO the gradient of its output and delta = sum(dO * out),

    dS = P * (dO V^T - delta)        dV += P^T dO        dq = dS k        dk += dS^T (q + u)

for window, block and cache alike; for the cache's values, which are means, the gradient of their sums is dC += (P /
count)^T dO. The cache's gradient runs backward as its sums run forward: dC is that of the sums after block r; the
values that left after it take their code's row; then, if the document is the same, dC is kept for the sums before. A
block's own keys and values have gradients from two blocks, itself and the next, whose window it is.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tvq_pod.nn.pallas.call import Operands, Pieces, Shape
from tvq_pod.nn.pallas.forward import ends, take_queries, take_sources
from tvq_pod.nn.pallas.tile import (
    Scores,
    as_column,
    chunks,
    dot,
    dot_at,
    dot_bt,
    one_hot,
    places,
    scores_of_tile,
    silu,
    silu_and_slope,
    turned_back,
    upside_down,
)

SMALL_SUMS = ("u", "v_bias", "at_reach")  # rows of `small_sums`, which has eight
OF_PARTS = ("q_gradient", "k_gradient", "by_distance_gradient", "small_sums", "k_window_gradient")  # to be summed


def backward(shape: Shape, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel. x: the operands, see core.py; those of `forward`, its `out` and `log_total`, the `means` of
    `caches_again`, and d_out, the gradient of forward's result (gated, if there are gates). With d_mean float32 [B, H,
    S, V], the gradient of `mean`, those of the state are computed, too.

    Returns the gradients q [R, B, H, G, L, K], k [R, B, H, L, K], v [R, B, H, L, V], gate; by_distance float32
    [B, H, L, K], one per row; small_sums float32 [R, B, H, G, I, 8, K], one per tile, with the rows SMALL_SUMS; and for
    the state k_window, v_window, float32 and shaped like them, and first_mean. Those of q and k are float32 if other
    devices add to them.
    """
    kernel = functools.partial(_backward_kernel, shape, "d_mean" in x)
    made = backward_operands(shape, x).run(kernel, "tvq_backward", shape, x, shape.multiply_adds(3, 2))
    return made | {name: _sum_of_parts(made[name]) for name in OF_PARTS if name in made}


def _sum_of_parts(x: jax.Array) -> jax.Array:
    return x[0] if len(x) == 1 else jnp.sum(x, axis=0)


def backward_operands(shape: Shape, x: dict) -> Operands:
    """The operands of the backward kernel, from arrays or ShapeDtypeStructs."""
    operands, order = Operands(), lambda r: shape.n_blocks - 1 - r
    pieces, columns, copy = Pieces(shape, order), Pieces(shape, order, "columns"), Pieces(shape, order, "copy")
    take_sources(operands, pieces, shape, x)
    take_queries(operands, pieces, shape, x)
    length, d_k, d_v, width, f32 = shape.block_len, shape.d_k, shape.d_v, shape.width, jnp.float32
    of_values, state_values = columns.of_block(length, width), columns.of_state(length, width)
    operands.take("k_before", x["k"], pieces.of_block(length, d_k, back=1))
    operands.take("k_before_first", x["k_window"], pieces.of_state(length, d_k))
    operands.take("v", x["v"], of_values)
    operands.take("v_before", x["v"], columns.of_block(length, width, back=1))
    operands.take("v_window", x["v_window"], state_values)
    for name in ("out", "d_out", *(["gate"] if shape.is_gated else [])):
        operands.take(name, x[name], columns.of_tile(width))
    operands.take("log_total", x["log_total"], pieces.of_tile_as_row())

    blocks = shape.n_blocks, shape.n_rows, shape.n_key_head
    queries, parts = (*blocks, shape.n_per_key_head), shape.n_parts
    operands.give("q_gradient", (parts, *queries, length, d_k), shape.partial_dtype, copy.of_tile(d_k))
    operands.give("k_gradient", (parts, *blocks, length, d_k), shape.partial_dtype, copy.of_block(length, d_k))
    operands.give("v_gradient", (*blocks, length, d_v), shape.dtype, of_values)
    if shape.is_gated:
        operands.give("gate_gradient", (*queries, length, d_v), shape.dtype, columns.of_tile(width))
    operands.give("by_distance_gradient", (parts, *blocks[1:], length, d_k), f32, copy.of_state(length, d_k))
    operands.give("small_sums", (parts, *queries, shape.n_tiles, 8, d_k), f32, copy.sums_of_tile(d_k))

    operands.hold("k_window", (length, d_k), shape.dtype)
    operands.hold("values", (2, length, width), shape.dtype)  # for even and odd blocks, as are the next three
    operands.hold("d_k", (2, length, d_k), f32)
    operands.hold("d_v", (2, length, width), f32)
    operands.hold("d_distance", (length, d_k), f32)
    if shape.is_gated:
        operands.hold("d_before_gate", (shape.tile, width), shape.dtype)
    if shape.has_cache:
        operands.take("means", x["means"], columns.of_block(shape.n_code, width))
    if shape.has_cache and shape.through_cache:
        operands.take("leaving", x["leaving"], pieces.of_block(1, length))
        operands.take("inverse", x["inverse"], pieces.of_block(1, shape.n_code))
        operands.hold("d_sums", (shape.n_code, width), f32)
    if "d_mean" in x:
        operands.give("k_window_gradient", (parts, *blocks[1:], length, d_k), f32, copy.of_state(length, d_k))
        operands.give("v_window_gradient", (*blocks[1:], length, d_v), f32, state_values)
        if shape.has_cache:
            of_sums = columns.of_state(shape.n_code, width)
            operands.take("d_mean", x["d_mean"], of_sums)
            operands.take("inverse_last", x["inverse_last"], pieces.of_state(1, shape.n_code))
            operands.take("first_count", x["first_count"], pieces.of_state(1, shape.n_code))
            operands.give("first_mean_gradient", (*blocks[1:], shape.n_code, d_v), f32, of_sums)
    return operands


def _backward_kernel(shape: Shape, to_state: bool, ref) -> None:
    block = shape.n_blocks - 1 - ref.step
    is_first_tile, is_last_tile = ends(shape, ref)
    is_last_block, is_first_block = ref.step == 0, block == 0
    now, before = lax.rem(block, 2), lax.rem(block + 1, 2)
    reaches_sums = shape.has_cache and shape.through_cache

    @pl.when(is_first_tile & is_last_block)
    def _():
        ref.values[now] = _activated(shape, ref.v)
        for name in ("d_k", "d_v"):
            array = getattr(ref, name)
            array[now] = jnp.zeros_like(array[now])
        ref.d_distance[...] = jnp.zeros_like(ref.d_distance)
        if reaches_sums and to_state:
            ref.d_sums[...] = ref.d_mean[...] * as_column(ref.inverse_last[...])
        elif reaches_sums:
            ref.d_sums[...] = jnp.zeros_like(ref.d_sums)

    @pl.when(is_first_tile & is_first_block)
    def _():
        ref.values[before] = ref.v_window[...]
        ref.k_window[...] = ref.k_before_first[...]

    @pl.when(is_first_tile & jnp.logical_not(is_first_block))
    def _():
        ref.values[before] = _activated(shape, ref.v_before)
        ref.k_window[...] = ref.k_before[...]

    @pl.when(is_first_tile)
    def _():
        ref.d_k[before] = jnp.zeros_like(ref.d_k[before])
        if reaches_sums:
            _take_from_sums(shape, ref, block)
        else:
            ref.d_v[before] = jnp.zeros_like(ref.d_v[before])

    _of_tile(shape, ref, now, before)

    @pl.when(is_last_tile)
    def _():
        ref.k_gradient[...] = ref.d_k[now].astype(shape.partial_dtype)
        for columns in chunks(shape.width):
            d_v = ref.d_v[now, :, columns]
            if shape.is_gated:
                d_v *= silu_and_slope(ref.v[:, columns])[1]
            ref.v_gradient[:, columns] = d_v.astype(shape.dtype)

    @pl.when(is_last_tile & is_first_block)
    def _():
        ref.by_distance_gradient[...] = ref.d_distance[...]
        if to_state:
            ref.k_window_gradient[...] = ref.d_k[before]
            ref.v_window_gradient[...] = ref.d_v[before]
        if to_state and reaches_sums:
            ref.first_mean_gradient[...] = ref.d_sums[...] * as_column(ref.first_count[...])
        elif to_state and shape.has_cache:
            ref.first_mean_gradient[...] = jnp.zeros_like(ref.first_mean_gradient)


def _activated(shape: Shape, values) -> jax.Array:
    return silu(values[...]).astype(shape.dtype) if shape.is_gated else values[...]


def _take_from_sums(shape: Shape, ref, block) -> None:
    """Takes the gradient of the values that leave after this block, and of the sums before it."""
    kept = (ref.kept[block, ref.row] > 0).astype(jnp.float32)
    leaving = one_hot(ref.leaving[...], shape.n_code, shape.dtype)
    for columns in chunks(shape.width):
        d_sums = ref.d_sums[:, columns]
        ref.d_v[lax.rem(block + 1, 2), :, columns] = dot_at(leaving, d_sums.astype(shape.dtype))
        ref.d_sums[:, columns] = d_sums * kept


def _of_tile(shape: Shape, ref, now, before) -> None:
    """Computes all gradients for one tile of queries: writes its own, and adds to the others."""
    dtype, first = shape.dtype, ref.tile * shape.tile
    q = ref.q[...]
    q_content, q_position = q + ref.u[...], q + ref.v_bias[...]
    k_window, log_total = ref.k_window[...], as_column(ref.log_total[...])

    delta = 0.0
    for columns in chunks(shape.width):
        d_out, out = (x[:, columns].astype(jnp.float32) for x in (ref.d_out, ref.out))
        if shape.is_gated:
            gate, slope = silu_and_slope(ref.gate[:, columns])
            ref.gate_gradient[:, columns] = (d_out * out * slope).astype(dtype)
            narrow = (d_out * gate).astype(dtype)
            ref.d_before_gate[:, columns] = narrow
            d_out = narrow.astype(jnp.float32)  # in the matmuls' precision: the two terms of dS must cancel
        delta += jnp.sum(d_out * out, axis=1, keepdims=True)
    d_out = ref.d_before_gate if shape.is_gated else ref.d_out

    scores = scores_of_tile(shape, ref, q_content, q_position, k_window, first)
    cache = None if scores.cache is None else jnp.exp(scores.cache - log_total)
    weights = Scores(jnp.exp(scores.window - log_total), jnp.exp(scores.block - log_total), cache)
    d_window = weights.window * (dot_bt(d_out[...], ref.values[before]) - delta)
    d_block = weights.block * (dot_bt(d_out[...], ref.values[now]) - delta)
    narrow = d_window.astype(dtype), d_block.astype(dtype)
    d_content = dot(narrow[0], k_window) + dot(narrow[1], ref.k[...])
    if weights.cache is not None:
        d_cache = weights.cache * (dot_bt(d_out[...], ref.means[...]) - delta)
        d_content += dot(d_cache.astype(dtype), ref.codes[...])

    for columns in chunks(shape.width):
        d = d_out[:, columns]
        ref.d_v[now, :, columns] += dot_at(weights.block.astype(dtype), d)
        if shape.through_cache:
            ref.d_v[before, :, columns] += dot_at(weights.window.astype(dtype), d)
        if shape.through_cache and weights.cache is not None:
            ref.d_sums[:, columns] += dot_at((weights.cache * ref.inverse[...]).astype(dtype), d)
    ref.d_k[now] += dot_at(narrow[1], q_content)
    if shape.through_cache:
        ref.d_k[before] += dot_at(narrow[0], q_content)

    query, key = places(shape, first)
    d_turned = jnp.where(key > query, d_window, d_block)
    d_farthest = jnp.sum(jnp.where(key == query, d_window, 0.0), axis=1, keepdims=True)
    d_flipped = turned_back(shape, d_turned, first).astype(dtype)
    d_position = upside_down(shape, dot(d_flipped, ref.by_distance[...]))
    d_position += d_farthest * ref.at_reach[...].astype(jnp.float32)
    ref.d_distance[...] += dot_at(d_flipped, upside_down(shape, q_position).astype(dtype))

    ref.q_gradient[...] = (d_content + d_position).astype(shape.partial_dtype)
    ref.small_sums[...] = jnp.zeros_like(ref.small_sums)
    for row, summed in enumerate((d_content, d_position, d_farthest * q_position.astype(jnp.float32))):
        ref.small_sums[row : row + 1, :] = jnp.sum(summed, axis=0, keepdims=True)
