"""The sums that a shard's own values add to the cache before its last block, and their gradient.

Shards must know their totals before any of them can run the forward kernel (start.py), and the gradient of a total is
known only after all of them have run the backward kernel. So both are separate kernels, with one matmul per block. XLA
would move the activated values, the slope of SiLU and the one-hot matrices through memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tvq_pod.nn.pallas.call import Operands, Pieces, Shape
from tvq_pod.nn.pallas.forward import activated, one_step_a_block
from tvq_pod.nn.pallas.tile import chunks, dot, dot_at, one_hot, silu_and_slope


def leaving_sums(shape: Shape, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes the sums. x: v [R, B, H, L, V], or a stack over layers; leaving int32 [R, B, H, 1, L], the codes of a
    block's tokens, -1 for those that don't count, such as all of the last block; kept, layer: see `Operands.run`.
    Returns total float32 [B, H, S, V]."""
    shape = one_step_a_block(shape)
    kernel = functools.partial(_sums_kernel, shape)
    return sums_operands(shape, x).run(kernel, "tvq_leaving", shape, x, _multiply_adds(shape))


def sums_operands(shape: Shape, x: dict) -> Operands:
    """The operands of `leaving_sums`, from arrays or ShapeDtypeStructs."""
    shape, operands = one_step_a_block(shape), Operands()
    _take(operands, shape, x)
    total, columns = (shape.n_rows, shape.n_key_head, shape.n_code, shape.d_v), Pieces(shape, of="columns")
    operands.give("total", total, jnp.float32, columns.of_state(shape.n_code, shape.width))
    return operands


def leaving_gradient(shape: Shape, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes the gradient. x: that of `leaving_sums`, and d_total [B, H, S, V] in `dtype`. Returns v_gradient [R, B,
    H, L, V]."""
    shape = one_step_a_block(shape)
    kernel = functools.partial(_gradient_kernel, shape)
    return gradient_operands(shape, x).run(kernel, "tvq_leaving_backward", shape, x, _multiply_adds(shape))


def gradient_operands(shape: Shape, x: dict) -> Operands:
    """The operands of `leaving_gradient`, from arrays or ShapeDtypeStructs."""
    shape, operands = one_step_a_block(shape), Operands()
    _take(operands, shape, x)
    columns = Pieces(shape, of="columns")
    operands.take("d_total", x["d_total"], columns.of_state(shape.n_code, shape.width))
    blocks = shape.n_blocks, shape.n_rows, shape.n_key_head
    gradient = *blocks, shape.block_len, shape.d_v
    operands.give("v_gradient", gradient, shape.dtype, columns.of_block(shape.block_len, shape.width))
    return operands


def _multiply_adds(shape: Shape) -> int:
    """The multiply-adds of all blocks except the last."""
    return shape.n_rows * shape.n_key_head * (shape.n_blocks - 1) * shape.n_code * shape.block_len * shape.d_v


def _take(operands: Operands, shape: Shape, x: dict) -> None:
    operands.take("v", x["v"], Pieces(shape, of="columns").of_block(shape.block_len, shape.width))
    operands.take("leaving", x["leaving"], Pieces(shape).of_block(1, shape.block_len))


def _sums_kernel(shape: Shape, ref) -> None:
    @pl.when(ref.step == 0)
    def _():
        ref.total[...] = jnp.zeros_like(ref.total)

    @pl.when(ref.step < shape.n_blocks - 1)
    def _():
        leaving = one_hot(ref.leaving[...], shape.n_code, shape.dtype)
        for columns in chunks(shape.width):
            ref.total[:, columns] += dot(leaving, activated(shape, ref.v[:, columns]))


def _gradient_kernel(shape: Shape, ref) -> None:
    @pl.when(ref.step < shape.n_blocks - 1)
    def _():
        leaving = one_hot(ref.leaving[...], shape.n_code, shape.dtype)
        for columns in chunks(shape.width):
            gradient = dot_at(leaving, ref.d_total[:, columns])
            if shape.is_gated:
                gradient *= silu_and_slope(ref.v[:, columns])[1]
            ref.v_gradient[:, columns] = gradient.astype(shape.dtype)

    @pl.when(ref.step == shape.n_blocks - 1)
    def _():
        ref.v_gradient[...] = jnp.zeros_like(ref.v_gradient)
