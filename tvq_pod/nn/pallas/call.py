"""How the kernels meet their operands: the grid, the shapes of the pieces that a grid step sees, and names for them.

The grid is (row b, key head h, block r, query head g of that key head, tile i of the block). Rows and heads are
independent of each other; blocks come in order, forward or backward, and what one block leaves to the next stays in
VMEM scratch. All query heads and tiles of a block read one copy of its keys, values and cache.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

COLUMNS = 512  # of values at a time: a matmul's result must not outgrow what registers and VMEM hold between steps


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for.

    tile: queries that a grid step takes; it divides block_len, which is also mem_len. has_cache: agg_cache.
    through_cache: grad_thru_cache. is_gated: values and gates come as projected, and their SiLU is the kernels' work.
    interpret: run as ordinary JAX operations, on any device. vmem_bytes: what a kernel may take of a core's VMEM.
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
    window_bias: float
    has_cache: bool
    through_cache: bool
    is_gated: bool
    interpret: bool
    vmem_bytes: int

    @property
    def n_tiles(self) -> int:
        """Tiles of a block."""
        return self.block_len // self.tile

    @property
    def computed_bytes(self) -> int:
        """Room for what a grid step computes: five times the scores of a tile, and four times some columns of values;
        and 2 MiB for what is small."""
        columns = 2 * self.block_len + (self.n_code if self.has_cache else 0)
        return 4 * self.tile * (5 * columns + 4 * min(self.d_v, COLUMNS)) + 2**21

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows, key heads, blocks, query heads of a key head, tiles."""
        return self.n_rows, self.n_key_head, self.n_blocks, self.n_per_key_head, self.n_tiles

    def multiply_adds(self, per_column: int, per_code_and_token: int) -> int:
        """Of all matmuls: for each query and column of window, block and cache, and for each code and token of a
        block."""
        n_blocks, n_code = self.n_rows * self.n_key_head * self.n_blocks, self.n_code if self.has_cache else 0
        columns = self.n_per_key_head * self.block_len * (2 * self.block_len + n_code)
        return n_blocks * (columns * per_column + n_code * self.block_len * per_code_and_token)


class Pieces:
    """Block specs by what an array is indexed with. Every piece is a matrix; the axes before it have size 1.

    block_at: the block that the grid's step r is at.
    """

    def __init__(self, shape: Shape, block_at: Callable = lambda r: r):
        self._shape, self._block_at = shape, block_at

    def of_tile(self, width: int) -> pl.BlockSpec:
        """Of [R, B, H, G, L, width]: the rows of a tile."""
        piece = (None, None, None, None, self._shape.tile, width)
        return pl.BlockSpec(piece, lambda b, h, r, g, i, *_: (self._block_at(r), b, h, g, i, 0))

    def of_tile_as_row(self) -> pl.BlockSpec:
        """Of [R, B, H, G, 1, L]: one number for each query of a tile."""
        piece = (None, None, None, None, 1, self._shape.tile)
        return pl.BlockSpec(piece, lambda b, h, r, g, i, *_: (self._block_at(r), b, h, g, 0, i))

    def of_tile_in_any_head(self) -> pl.BlockSpec:
        """Of [R, B, 1, L]: the same, for all heads alike."""
        return pl.BlockSpec(
            (None, None, 1, self._shape.tile), lambda b, h, r, g, i, *_: (self._block_at(r), b, 0, i)
        )  # fmt: skip

    def sums_of_tile(self, width: int) -> pl.BlockSpec:
        """Of [R, B, H, G, I, 8, width]: eight rows for each tile."""
        piece = (None, None, None, None, None, 8, width)
        return pl.BlockSpec(piece, lambda b, h, r, g, i, *_: (self._block_at(r), b, h, g, i, 0, 0))

    def of_block(self, height: int, width: int, back: int = 0) -> pl.BlockSpec:
        """Of [R, B, H, height, width]. back: so many blocks earlier; the first again where there is none."""

        def index(b, h, r, g, i, *_):
            block = self._block_at(r)
            return (jnp.maximum(block - back, 0) if back else block), b, h, 0, 0

        return pl.BlockSpec((None, None, None, height, width), index)

    def of_state(self, height: int, width: int) -> pl.BlockSpec:
        """Of [B, H, height, width]."""
        return pl.BlockSpec((None, None, height, width), lambda b, h, r, g, i, *_: (b, h, 0, 0))

    def of_head(self, height: int, width: int) -> pl.BlockSpec:
        """Of [H, height, width]."""
        return pl.BlockSpec((None, height, width), lambda b, h, r, g, i, *_: (h, 0, 0))

    def of_query_head(self, width: int) -> pl.BlockSpec:
        """Of [H, G, 1, width]."""
        return pl.BlockSpec((None, None, 1, width), lambda b, h, r, g, i, *_: (h, g, 0, 0))


class Operands:
    """The inputs, outputs and scratch of one kernel, by name."""

    def __init__(self):
        self.inputs: dict[str, tuple[jax.Array, pl.BlockSpec]] = {}
        self.outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
        self.scratch: dict[str, Any] = {}
        self._of_stacks: list[pl.BlockSpec] = []

    def take(self, name: str, array: jax.Array, spec: pl.BlockSpec) -> None:
        """An input. One with an axis more than its pieces is a stack of layers' arrays, of which this layer's is read."""
        assert spec.block_shape is not None
        self.inputs[name] = array, self._of_layer(spec) if array.ndim > len(spec.block_shape) else spec

    def give(self, name: str, shape: tuple[int, ...], dtype, spec: pl.BlockSpec) -> None:
        """An output."""
        self.outputs[name] = jax.ShapeDtypeStruct(shape, dtype), spec

    def hold(self, name: str, shape: tuple[int, ...], dtype) -> None:
        """An array in VMEM that stays from grid step to grid step."""
        self.scratch[name] = pltpu.VMEM(shape, dtype)

    def _in_pieces(self) -> list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
        """Inputs and outputs that travel, of this layer."""
        found = []
        for array, spec in (*self.inputs.values(), *self.outputs.values()):
            if spec.block_shape is not None:
                own = array.shape[1:] if spec in self._of_stacks else array.shape
                found.append((jax.ShapeDtypeStruct(own, array.dtype), spec))
        return found

    def _into_stacks(self, x: dict) -> dict[int, int]:
        """Lets outputs be written into the stacks that x has for them. Returns which input is which output's memory."""
        aliases = {}
        for place, (name, (output, spec)) in enumerate(self.outputs.items()):
            if (stack := x.get(f"{name}_stack")) is not None:
                aliases[len(self.inputs)] = place
                self.inputs[f"{name}_stack"] = stack, pl.BlockSpec(memory_space=pl.ANY)
                self.outputs[name] = jax.ShapeDtypeStruct(stack.shape, output.dtype), self._of_layer(spec)
        return aliases

    def _of_layer(self, spec: pl.BlockSpec) -> pl.BlockSpec:
        """The same piece, of the array that this layer has in a stack."""
        block_shape, index_map = spec.block_shape, spec.index_map
        assert block_shape is not None and index_map is not None
        of_stack = pl.BlockSpec((None, *block_shape), lambda *at: (at[-1][0], *index_map(*at)))
        self._of_stacks.append(of_stack)
        return of_stack

    def needed_bytes(self, shape: Shape) -> int:
        """An estimate, from above, of what the kernel takes of VMEM: twice the pieces, since the next ones travel
        meanwhile; the scratch; and what is computed. The last two axes of an array are padded to whole tiles."""
        pieces = [(spec.block_shape, array.dtype) for array, spec in self._in_pieces()]
        held = [(memory.shape, memory.dtype) for memory in self.scratch.values()]
        there = sum(2 * _padded_bytes(*piece) for piece in pieces) + sum(_padded_bytes(*array) for array in held)
        return there + shape.computed_bytes

    def run(self, kernel: Callable, name: str, shape: Shape, x: dict, multiply_adds: int) -> dict[str, jax.Array]:
        """The outputs of kernel(refs) over the grid. refs has as attributes the operands; `kept`, int32 [R, B], in
        scalar memory; and the place in the grid, row, key_head, step (of blocks), query_head and tile.

        x: kept; and layer, int32 [1], if some operands are stacks. multiply_adds: of all matmuls over the grid. The
        compiler is told of them, and of what travels."""
        aliases = self._into_stacks(x)
        names = [*self.inputs, *self.outputs, *self.scratch]

        def body(kept_ref, _layer_ref, *refs):
            at = dict(zip(("row", "key_head", "step", "query_head", "tile"), map(pl.program_id, range(5)), strict=True))
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
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
                # In what is left over, XLA keeps arrays from one operation to the next: a step of one layer of
                # configs/throughput.py takes 2.44 ms then, kernels left out, and 2.53 where they may have all
                vmem_limit_bytes=min(shape.vmem_bytes, self.needed_bytes(shape)),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * multiply_adds,
                bytes_accessed=moved,
                transcendentals=math.prod(shape.grid) * shape.tile * (2 * shape.block_len + shape.n_code),
            ),
            interpret=shape.interpret,
            input_output_aliases={len(scalars) + taken: given for taken, given in aliases.items()},
            name=name,
        )(*scalars, *arrays)
        return dict(zip(self.outputs, outputs, strict=True))


def _padded_bytes(shape, dtype) -> int:
    size = jnp.dtype(dtype).itemsize
    *lead, height, width = (1 if n is None else n for n in shape)
    rows, lanes = 32 // size, 128
    return math.prod(lead) * -(-height // rows) * rows * -(-width // lanes) * lanes * size
