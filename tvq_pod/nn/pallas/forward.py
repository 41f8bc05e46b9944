"""The forward kernel, and the one that recomputes the caches for the backward pass.

Block r attends to its window, which is block r - 1, to itself, and to the cache of all earlier blocks. Then the window
leaves, and its values are added to the cache's sums. Sums (float32, [S, V]) and the activated values of two blocks stay
in VMEM; neither windows nor the caches of blocks are ever in HBM.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tvq_pod.nn.pallas.call import Operands, Pieces, Shape
from tvq_pod.nn.pallas.tile import as_column, as_row, chunks, dot, one_hot, scores_of_tile, silu


def forward(shape: Shape, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel. x: the operands, see core.py. Returns out [R, B, H, G, L, V], before the gate; gated, the same
    times the gate's SiLU, if there are gates; log_total float32 [R, B, H, G, 1, L], the logarithm of each query's sum
    of weights; with a cache, mean float32 [B, H, S, V], the cache's after the last block."""
    kernel, multiply_adds = functools.partial(_forward_kernel, shape), shape.multiply_adds(1, 1)
    made = forward_operands(shape, x).run(kernel, "tvq_forward", shape, x, multiply_adds)
    return made | dict(log_total=made["log_total"][0])  # the same in every part


def forward_operands(shape: Shape, x: dict) -> Operands:
    """The operands of the forward kernel, from arrays or ShapeDtypeStructs."""
    operands, pieces, columns, copy = Operands(), Pieces(shape), Pieces(shape, of="columns"), Pieces(shape, of="copy")
    take_sources(operands, pieces, shape, x)
    operands.take("k_before_first", x["k_window"], pieces.of_state(shape.block_len, shape.d_k))
    take_queries(operands, pieces, shape, x)
    take_sums(operands, shape, x)
    queries = shape.n_blocks, shape.n_rows, shape.n_key_head, shape.n_per_key_head
    values = (*queries, shape.block_len, shape.d_v)
    operands.give("out", values, shape.dtype, columns.of_tile(shape.width))
    if shape.is_gated:
        operands.take("gate", x["gate"], columns.of_tile(shape.width))
        operands.give("gated", values, shape.dtype, columns.of_tile(shape.width))
    log_total = shape.n_parts, *queries, 1, shape.block_len
    operands.give("log_total", log_total, jnp.float32, copy.of_tile_as_row())
    operands.hold("k_window", (shape.block_len, shape.d_k), shape.dtype)
    if shape.has_cache:
        operands.take("inverse_after", x["inverse_after"], pieces.of_block(1, shape.n_code))
        mean = shape.n_rows, shape.n_key_head, shape.n_code, shape.d_v
        operands.give("mean", mean, jnp.float32, columns.of_state(shape.n_code, shape.width))
        operands.hold("means", (shape.n_code, shape.width), shape.dtype)
    return operands


def take_sources(operands: Operands, pieces: Pieces, shape: Shape, x: dict) -> None:
    """Adds the operands that keys are made from, and those that decide which keys a query sees."""
    operands.take("k", x["k"], pieces.of_block(shape.block_len, shape.d_k))
    operands.take("by_distance", x["by_distance"], pieces.of_head(shape.block_len, shape.d_k))
    operands.take("at_reach", x["at_reach"], pieces.of_head(1, shape.d_k))
    operands.take("positions", x["positions"], pieces.of_tile_in_any_head())
    if shape.has_cache:
        operands.take("codes", x["codes"], pieces.of_head(shape.n_code, shape.d_k))
        operands.take("sees_cache", x["sees_cache"], pieces.of_tile_in_any_head())
        operands.take("log_counts", x["log_counts"], pieces.of_block(1, shape.n_code))


def take_queries(operands: Operands, pieces: Pieces, shape: Shape, x: dict) -> None:
    """Adds the queries, and the vectors that are added to them."""
    operands.take("q", x["q"], pieces.of_tile(shape.d_k))
    for name in ("u", "v_bias"):
        operands.take(name, x[name], pieces.of_query_head(shape.d_k))


def take_sums(operands: Operands, shape: Shape, x: dict) -> None:
    """Adds the operands of the cache's running sums."""
    pieces, columns = Pieces(shape), Pieces(shape, of="columns")
    operands.take("v", x["v"], columns.of_block(shape.block_len, shape.width))
    operands.take("v_window", x["v_window"], columns.of_state(shape.block_len, shape.width))
    operands.hold("values", (2, shape.block_len, shape.width), shape.dtype)  # for even and odd blocks
    if shape.has_cache:
        operands.take("leaving", x["leaving"], pieces.of_block(1, shape.block_len))
        operands.take("inverse", x["inverse"], pieces.of_block(1, shape.n_code))
        operands.take("first_mean", x["first_mean"], columns.of_state(shape.n_code, shape.width))
        operands.take("first_count", x["first_count"], pieces.of_state(1, shape.n_code))
        operands.hold("sums", (shape.n_code, shape.width), jnp.float32)


def _forward_kernel(shape: Shape, ref) -> None:
    block, (is_first_tile, is_last_tile) = ref.step, ends(shape, ref)
    now, before = lax.rem(block, 2), lax.rem(block + 1, 2)

    @pl.when(is_first_tile & (block == 0))
    def _():
        ref.k_window[...] = ref.k_before_first[...]
        ref.values[0] = jnp.zeros_like(ref.values[0])
        _start_sums(shape, ref)
        if shape.has_cache:
            ref.means[...] = (ref.sums[...] * as_column(ref.inverse[...])).astype(shape.dtype)

    # A tile needs the values of later tiles only as factors of weights that are 0. So the vector unit activates values
    # tile by tile, while the matrix unit is busy.
    q, first = ref.q[...], ref.tile * shape.tile
    rows = pl.ds(pl.multiple_of(first, shape.tile), shape.tile)
    for columns in chunks(shape.width):
        ref.values[now, rows, columns] = activated(shape, ref.v[rows, columns])
    scores = scores_of_tile(shape, ref, q + ref.u[...], q + ref.v_bias[...], ref.k_window[...], first)
    top = functools.reduce(jnp.maximum, [jnp.max(part, axis=1, keepdims=True) for part in scores.there()])
    weights = [jnp.exp(part - top) for part in scores.there()]
    total = sum(jnp.sum(part, axis=1, keepdims=True) for part in weights)
    weights = [part.astype(shape.dtype) for part in weights]
    inverse_total = 1.0 / total
    for columns in chunks(shape.width):
        out = dot(weights[0], ref.values[before, :, columns]) + dot(weights[1], ref.values[now, :, columns])
        if shape.has_cache:
            out += dot(weights[2], ref.means[:, columns])
        out *= inverse_total
        ref.out[:, columns] = out.astype(shape.dtype)
        if shape.is_gated:
            ref.gated[:, columns] = (out * silu(ref.gate[:, columns])).astype(shape.dtype)
    ref.log_total[...] = as_row(top + jnp.log(total))

    @pl.when(is_last_tile)
    def _():
        ref.k_window[...] = ref.k[...]
        if shape.has_cache:
            inverse = as_column(ref.inverse_after[...])
            for columns, sums in _add_leaving(shape, ref):
                ref.means[:, columns] = (sums * inverse).astype(shape.dtype)

    if shape.has_cache:

        @pl.when(is_last_tile & (block == shape.n_blocks - 1))
        def _():
            ref.mean[...] = ref.sums[...] * as_column(ref.inverse_after[...])


def ends(shape: Shape, ref) -> tuple[jax.Array, jax.Array]:
    """Whether this grid step is the first of its block, and the last."""
    is_first = (ref.query_head == 0) & (ref.tile == 0)
    return is_first, (ref.query_head == shape.n_per_key_head - 1) & (ref.tile == shape.n_tiles - 1)


def _start_sums(shape: Shape, ref) -> None:
    """Initializes the window's values and the cache's sums from the state."""
    ref.values[1] = ref.v_window[...]
    if shape.has_cache:
        ref.sums[...] = ref.first_mean[...] * as_column(ref.first_count[...])


def activated(shape: Shape, values: jax.Array) -> jax.Array:
    """The values for attention: the SiLU of the projection, if there are gates."""
    return silu(values).astype(shape.dtype) if shape.is_gated else values


def _add_leaving(shape: Shape, ref):
    """Adds the window, which leaves after this block, to the cache's sums, some columns at a time."""
    kept = (ref.kept[ref.step, ref.row] > 0).astype(jnp.float32)
    leaving = one_hot(ref.leaving[...], shape.n_code, shape.dtype)
    for columns in chunks(shape.width):
        values = ref.values[lax.rem(ref.step + 1, 2), :, columns]
        sums = ref.sums[:, columns] * kept + dot(leaving, values)
        ref.sums[:, columns] = sums
        yield columns, sums


def caches_again(shape: Shape, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns means [R, B, H, S, V], in `dtype`: those of the cache that each block attends to."""
    shape = one_step_a_block(shape)
    kernel, multiply_adds = functools.partial(_caches_kernel, shape), shape.multiply_adds(0, 0)
    return caches_operands(shape, x).run(kernel, "tvq_caches", shape, x, multiply_adds)


def caches_operands(shape: Shape, x: dict) -> Operands:
    """The operands of the kernel that recomputes the caches, from arrays or ShapeDtypeStructs."""
    shape, operands = one_step_a_block(shape), Operands()
    take_sums(operands, shape, x)
    means = shape.n_blocks, shape.n_rows, shape.n_key_head, shape.n_code, shape.d_v
    operands.give("means", means, shape.dtype, Pieces(shape, of="columns").of_block(shape.n_code, shape.width))
    return operands


def one_step_a_block(shape: Shape) -> Shape:
    """The grid of kernels without queries."""
    return dataclasses.replace(shape, n_per_key_head=1, tile=shape.block_len)


def _caches_kernel(shape: Shape, ref) -> None:
    @pl.when(ref.step == 0)
    def _():
        _start_sums(shape, ref)

    ref.means[...] = (ref.sums[...] * as_column(ref.inverse[...])).astype(shape.dtype)
    ref.values[lax.rem(ref.step, 2)] = activated(shape, ref.v[...])
    for _columns in _add_leaving(shape, ref):
        pass
