"""The kernels' interface to their operands: the grid, the shapes of the pieces for a grid step, and their names.

The grid is (row b, key head h, part p of the values' width, block r, query head g of that key head, tile i of the
block). Rows, heads and parts are independent of each other; blocks run in order, forward or backward, and what one
block passes to the next stays in VMEM scratch. All query heads and tiles of a block read one copy of its keys, values
and cache.

A part has some of the columns of the values, of the gates and of the output. It computes all scores and weights itself,
which takes matmuls of width K only. Its columns contribute to the gradients of the scores, and so to those of queries
and keys, which are linear in them: the gradients of all parts are summed afterward.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

COLUMNS = 512  # columns of values at a time: a matmul's result must not outgrow registers and VMEM
GRID = ("row", "key_head", "part", "step", "query_head", "tile")
PARALLEL = GRID[:3]


@dataclasses.dataclass(frozen=True)
class Core:
    """The core that kernels run on. vmem_bytes: its vector memory; 0: it is not a TPU, and kernels run as ordinary JAX
    operations. n_per_device: cores that share the grid of a kernel, along one of its parallel dimensions. can_turn:
    whether it can rotate each row by a different shift."""

    vmem_bytes: int
    n_per_device: int = 1
    can_turn: bool = True

    @property
    def usable_bytes(self) -> int:
        """The memory that a kernel may use; the compiler reserves some."""
        return self.vmem_bytes * 7 // 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that the kernels are compiled for, on one device.

    tile: queries per grid step; it divides block_len, which is also mem_len. n_parts: parts of the d_v columns of
    values. is_summed: several devices share the columns or the query heads, and their gradients are summed. has_cache:
    agg_cache. through_cache: grad_thru_cache. is_gated: values and gates are raw projections, and the kernels compute
    their SiLU.
    """

    n_blocks: int
    n_rows: int
    n_key_head: int
    n_per_key_head: int
    block_len: int
    n_code: int
    d_k: int
    d_v: int
    dtype: Any
    tile: int
    n_parts: int
    is_summed: bool
    window_bias: float
    has_cache: bool
    through_cache: bool
    is_gated: bool
    core: Core

    @property
    def n_tiles(self) -> int:
        """The number of tiles in a block."""
        return self.block_len // self.tile

    @property
    def width(self) -> int:
        """The number of value columns in a part."""
        return self.d_v // self.n_parts

    @property
    def partial_dtype(self):
        """The dtype of a part's gradients of queries and keys: float32 if they will be summed, so that they are rounded
        only once. They are narrow compared with the values."""
        return jnp.dtype(jnp.float32) if self.is_summed or self.n_parts > 1 else self.dtype

    @property
    def computed_bytes(self) -> int:
        """The memory for a grid step's intermediate results: five times the scores of a tile, four times some columns
        of values, and 2 MiB for small arrays."""
        columns = 2 * self.block_len + (self.n_code if self.has_cache else 0)
        return 4 * self.tile * (5 * columns + 4 * min(self.width, COLUMNS)) + 2**21

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows, key heads, parts, blocks, query heads of a key head, tiles."""
        return self.n_rows, self.n_key_head, self.n_parts, self.n_blocks, self.n_per_key_head, self.n_tiles

    def multiply_adds(self, of_keys: int, of_values: int) -> int:
        """The multiply-adds of all matmuls. of_keys, of_values: the number of matmuls over a query's window, block and
        cache with the width of keys and of values. The cache's sums are one more, with the width of values."""
        n_blocks, n_code = self.n_rows * self.n_key_head * self.n_blocks, self.n_code if self.has_cache else 0
        columns = self.n_per_key_head * self.block_len * (2 * self.block_len + n_code)
        per_column = of_keys * self.d_k * self.n_parts + of_values * self.d_v
        return n_blocks * (columns * per_column + n_code * self.block_len * self.d_v)


class Pieces:
    """Block specs, by the kind of an array's indices. Every piece is a matrix; the axes before it have size 1.

    block_at: the block of the grid's step r. of: what a part gets of the array: "all" of it; its "columns", of which
    the last axis has n_parts times as many; or a "copy", if the array has a leading axis for the parts.
    """

    def __init__(self, shape: Shape, block_at: Callable = lambda r: r, of: Literal["all", "columns", "copy"] = "all"):
        self._shape, self._block_at, self._of = shape, block_at, of

    def _piece(self, n_axes: int, height: int, width: int, index: Callable) -> pl.BlockSpec:
        """Makes a block spec. index(b, h, r, g, i): the index of a piece in an array of n_axes, without the last axis
        if that is not cut."""
        sizes = (*[None] * (n_axes - 2 + (self._of == "copy")), height, width)

        def index_map(b, h, p, r, g, i, *_):
            at = index(b, h, self._block_at(r), g, i)
            if len(at) < n_axes:
                at = (*at, p if self._of == "columns" else 0)
            return (p, *at) if self._of == "copy" else at

        return pl.BlockSpec(sizes, index_map)

    def of_tile(self, width: int) -> pl.BlockSpec:
        """The rows of a tile in [R, B, H, G, L, width]."""
        return self._piece(6, self._shape.tile, width, lambda b, h, r, g, i: (r, b, h, g, i))

    def of_tile_as_row(self) -> pl.BlockSpec:
        """One number for each query of a tile, in [R, B, H, G, 1, L]."""
        return self._piece(6, 1, self._shape.tile, lambda b, h, r, g, i: (r, b, h, g, 0, i))

    def of_tile_in_any_head(self) -> pl.BlockSpec:
        """One number for each query of a tile, the same for all heads, in [R, B, 1, L]."""
        return self._piece(4, 1, self._shape.tile, lambda b, h, r, g, i: (r, b, 0, i))

    def sums_of_tile(self, width: int) -> pl.BlockSpec:
        """Eight rows for each tile, in [R, B, H, G, I, 8, width]."""
        return self._piece(7, 8, width, lambda b, h, r, g, i: (r, b, h, g, i, 0))

    def of_block(self, height: int, width: int, back: int = 0) -> pl.BlockSpec:
        """A block of [R, B, H, height, width]. back: how many blocks earlier; the first block if there is none."""
        return self._piece(5, height, width, lambda b, h, r, g, i: (jnp.maximum(r - back, 0) if back else r, b, h, 0))

    def of_state(self, height: int, width: int) -> pl.BlockSpec:
        """The state's part of [B, H, height, width]."""
        return self._piece(4, height, width, lambda b, h, r, g, i: (b, h, 0))

    def of_head(self, height: int, width: int) -> pl.BlockSpec:
        """A head's part of [H, height, width]."""
        return self._piece(3, height, width, lambda b, h, r, g, i: (h, 0))

    def of_query_head(self, width: int) -> pl.BlockSpec:
        """A query head's part of [H, G, 1, width]."""
        return self._piece(4, 1, width, lambda b, h, r, g, i: (h, g, 0))


class Operands:
    """The inputs, outputs and scratch of one kernel, by name."""

    def __init__(self):
        self.inputs: dict[str, tuple[jax.Array, pl.BlockSpec]] = {}
        self.outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
        self.scratch: dict[str, Any] = {}
        self._of_stacks: list[pl.BlockSpec] = []

    def take(self, name: str, array: jax.Array, spec: pl.BlockSpec) -> None:
        """Adds an input. An array with one axis more than its pieces is a stack over layers, of which this layer's is
        read."""
        assert spec.block_shape is not None
        self.inputs[name] = array, self._of_layer(spec) if array.ndim > len(spec.block_shape) else spec

    def give(self, name: str, shape: tuple[int, ...], dtype, spec: pl.BlockSpec) -> None:
        """Adds an output."""
        self.outputs[name] = jax.ShapeDtypeStruct(shape, dtype), spec

    def hold(self, name: str, shape: tuple[int, ...], dtype) -> None:
        """Adds an array in VMEM that persists between grid steps."""
        self.scratch[name] = pltpu.VMEM(shape, dtype)

    def _in_pieces(self) -> list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
        """This layer's inputs and outputs that are moved between memories."""
        found = []
        for array, spec in (*self.inputs.values(), *self.outputs.values()):
            if spec.block_shape is not None:
                own = array.shape[1:] if spec in self._of_stacks else array.shape
                found.append((jax.ShapeDtypeStruct(own, array.dtype), spec))
        return found

    def _into_stacks(self, x: dict) -> dict[int, int]:
        """Aliases outputs with the stacks that x has for them. Returns the output for each aliased input."""
        aliases = {}
        for place, (name, (output, spec)) in enumerate(self.outputs.items()):
            if (stack := x.get(f"{name}_stack")) is not None:
                aliases[len(self.inputs)] = place
                self.inputs[f"{name}_stack"] = stack, pl.BlockSpec(memory_space=pl.ANY)
                self.outputs[name] = jax.ShapeDtypeStruct(stack.shape, output.dtype), self._of_layer(spec)
        return aliases

    def _of_layer(self, spec: pl.BlockSpec) -> pl.BlockSpec:
        """The same piece, in this layer's array within a stack."""
        block_shape, index_map = spec.block_shape, spec.index_map
        assert block_shape is not None
        assert index_map is not None
        of_stack = pl.BlockSpec((None, *block_shape), lambda *at: (at[-1][0], *index_map(*at)))
        self._of_stacks.append(of_stack)
        return of_stack

    def needed_bytes(self, shape: Shape, scarce: bool = True) -> int:
        """An upper estimate of the kernel's VMEM: twice the pieces, since the next ones are moved in the meantime; the
        scratch; and intermediate results, for which half the room is enough if VMEM is scarce. Gradients of the state
        are written at once and take more. The last two axes of an array are padded to full tiles."""
        pieces = [(spec.block_shape, array.dtype) for array, spec in self._in_pieces()]
        held = [(memory.shape, memory.dtype) for memory in self.scratch.values()]
        there = sum(2 * _padded_bytes(*piece) for piece in pieces) + sum(_padded_bytes(*array) for array in held)
        more = 8 * shape.block_len * shape.width if "d_mean" in self.inputs else 0
        return there + more + shape.computed_bytes // (2 if scarce else 1)

    def run(self, kernel: Callable, name: str, shape: Shape, x: dict, multiply_adds: int) -> dict[str, jax.Array]:
        """Runs kernel(refs) over the grid, and returns its outputs. The attributes of refs are the operands; `kept`,
        int32 [R, B], in scalar memory; and the grid indices row, key_head, part, step (of blocks), query_head and tile.

        x: has kept; layer, int32 [1], if some operands are stacks; and under NAME_stack, the stack that output NAME is
        written into. multiply_adds: those of all matmuls over the grid. They are passed to the compiler as a cost
        estimate, with the bytes that are moved."""
        aliases = self._into_stacks(x)
        names = [*self.inputs, *self.outputs, *self.scratch]

        def body(kept_ref, _layer_ref, *refs):
            at = {name: pl.program_id(axis) for axis, name in enumerate(GRID)}
            kernel(SimpleNamespace(kept=kept_ref, **at, **dict(zip(names, refs, strict=True))))

        arrays, in_specs = zip(*self.inputs.values(), strict=True)
        shapes, out_specs = zip(*self.outputs.values(), strict=True)
        scalars = x["kept"], x.get("layer", jnp.zeros([1], jnp.int32))
        moved = sum(math.prod(array.shape) * array.dtype.itemsize for array, _ in self._in_pieces())
        outputs = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=shape.grid,
                in_specs=in_specs,
                out_specs=list(out_specs),
                scratch_shapes=list(self.scratch.values()),
            ),
            out_shape=list(shapes),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=tuple("parallel" if name in PARALLEL else "arbitrary" for name in GRID),
                # XLA uses the remaining VMEM to keep arrays between operations: a step of one layer of
                # configs/throughput.py takes 2.44 ms then, kernels left out, and 2.53 where they may have all
                vmem_limit_bytes=min(shape.core.usable_bytes, self.needed_bytes(shape, scarce=False)),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * multiply_adds,
                bytes_accessed=moved,
                transcendentals=math.prod(shape.grid) * shape.tile * (2 * shape.block_len + shape.n_code),
            ),
            interpret=not shape.core.vmem_bytes,
            input_output_aliases={len(scalars) + taken: given for taken, given in aliases.items()},
            name=name,
        )(*scalars, *arrays)
        return dict(zip(self.outputs, outputs, strict=True))


def _padded_bytes(shape, dtype) -> int:
    size = jnp.dtype(dtype).itemsize
    *lead, height, width = (1 if n is None else n for n in shape)
    rows, lanes = 32 // size, 128
    return math.prod(lead) * -(-height // rows) * rows * -(-width // lanes) * lanes * size
