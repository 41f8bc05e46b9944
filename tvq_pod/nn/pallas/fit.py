"""Decides whether a config can use the kernels on a kind of device, and with which sizes, before anything is compiled.

A kernel processes as many queries at a time, a tile, and as many columns of values, a part, as fit in VMEM. Scheduled
bundles for a block on v5p (L = M = S = 512, K = 128, bfloat16; jax 0.10.2, libtpu 0.0.42.1), all parts together:

    tile, parts     forward, V = 4096     backward
    256, 2          75,900                127,800
    128, 2          76,400                142,400
    256, 4          87,500                147,300
    128, 4          86,000                160,400

So a part costs as much as 350 columns, for its own scores and weights, and tiles of 128 make the columns 15% more
expensive in the backward kernel. A device with two cores (v4, v5p) splits one of the parallel dimensions of the grid:
rows, key heads or parts. With a single row, it takes parts to give the second core work: at V = 1536 forward and
backward take 46,600 bundles a block in two parts, 83,100 in one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tvq_pod.nn.axes import placement
from tvq_pod.nn.pallas.backward import backward_operands
from tvq_pod.nn.pallas.call import PARALLEL, Core, Operands, Shape
from tvq_pod.nn.pallas.forward import caches_operands, forward_operands
from tvq_pod.nn.types import TransformerConfig

MIB = 2**20


_V5E, _V5P, _V6E, _V7X = Core(128 * MIB), Core(64 * MIB, n_per_device=2), Core(128 * MIB), Core(64 * MIB)
CORES = {  # by JAX's device kind, in different versions
    "TPU v4": Core(16 * MIB, n_per_device=2, can_turn=False),
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), _V5E),
    **dict.fromkeys(("TPU v5", "TPU v5p"), _V5P),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), _V6E),
    **dict.fromkeys(("TPU7x", "TPU v7x"), _V7X),
}
INTERPRETED = Core(0)
TILES = {256: 1.0, 128: 1.15}  # queries at a time, and the cost of a column of values
PART_COLUMNS = 350  # a part costs as much as this many columns
KERNELS = (forward_operands, caches_operands, backward_operands)
LANES = 128
DIVISORS = dict(block_len=LANES, n_code=64, d_k=8)  # queries and keys of a block are rotated by lanes


def shape_of(config: TransformerConfig, device_kind: str, q_shape: tuple[int, ...], d_v: int, is_gated: bool) -> Shape:
    """The sizes that the kernels are compiled for, except those that `sized` chooses. q_shape: [R, B, H, G, L, K], one
    device's queries. d_v: its columns of values."""
    c, core = config, CORES.get(device_kind, INTERPRETED)
    n_blocks, n_rows, n_key_head, n_per_key_head, block_len, d_k = q_shape
    return Shape(
        n_blocks=n_blocks,
        n_rows=n_rows,
        n_key_head=n_key_head,
        n_per_key_head=n_per_key_head,
        block_len=block_len,
        n_code=c.n_code,
        d_k=d_k,
        d_v=d_v,
        dtype=jnp.dtype(c.dtype),
        tile=block_len,
        n_parts=1,
        is_summed=d_v < c.d_v or n_per_key_head < c.n_head // c.n_key_head,
        window_bias=c.window_bias,
        has_cache=c.agg_cache,
        through_cache=c.grad_thru_cache,
        is_gated=is_gated,
        core=core,
    )


def sized(shape: Shape, operands: Callable[[Shape, dict], Operands], x: dict) -> Shape:
    """The shape with the fastest tile and number of parts that fit, for one of the kernels. operands: makes the
    kernel's operands from `x`.

    Where kernels are interpreted, a tile is half a block and a part half the columns, if these can be halved, so that
    tests have several of each.
    """
    if not shape.core.vmem_bytes:
        tile, width = (size // 2 if size % 2 == 0 else size for size in (shape.block_len, shape.d_v))
        return dataclasses.replace(shape, tile=tile, n_parts=shape.d_v // width)
    choices = _choices(shape)
    fitting = [choice for choice in choices if operands(choice, x).needed_bytes(choice) <= shape.core.usable_bytes]
    return min(fitting or choices[-1:], key=_cost)


def _choices(shape: Shape) -> list[Shape]:
    """All shapes that can be compiled, the smallest last. The columns of a part are a multiple of the lanes."""
    tiles = [tile for tile in TILES if shape.block_len % tile == 0] or [shape.block_len]
    parts = [n for n in range(1, shape.d_v // LANES + 1) if shape.d_v % (n * LANES) == 0] or [1]
    return [dataclasses.replace(shape, tile=tile, n_parts=n_parts) for n_parts in parts for tile in tiles]


def _cost(shape: Shape) -> float:
    """The time for the grid, in columns of values; see the head of this file."""
    n_cores = shape.core.n_per_device
    busiest = min(-(-size // n_cores) / size for size in shape.grid[: len(PARALLEL)])  # one core's share
    return busiest * (shape.n_parts * PART_COLUMNS + shape.d_v * TILES.get(shape.tile, 1.0))


class Dtypes(dict):
    """An object with a dtype for each operand's name, which is all that its size in VMEM depends on. to_state: whether
    the backward kernel has d_mean, and so computes the gradients of the state, too."""

    OTHERS = dict(
        **dict.fromkeys(("positions", "sees_cache", "leaving"), jnp.int32),
        **dict.fromkeys(("log_counts", "inverse", "inverse_after", "first_mean", "first_count"), jnp.float32),
        **dict.fromkeys(("inverse_last", "log_total", "d_mean"), jnp.float32),
    )

    def __init__(self, dtype, to_state: bool = True):
        super().__init__()
        self._dtype, self._to_state = dtype, to_state

    def __getitem__(self, name):
        return jax.ShapeDtypeStruct((), self.OTHERS.get(name, self._dtype))

    def __contains__(self, name):
        return name != "d_mean" or self._to_state


def _on_a_device(c: TransformerConfig, n_model: int) -> tuple[int, int, int] | None:
    """The key heads, query heads per key head and value columns on one of n_model devices; None if none can be
    divided."""
    n_key_head, n_per_key_head = c.n_key_head, c.n_head // c.n_key_head
    if n_key_head % n_model == 0:
        return n_key_head // n_model, n_per_key_head, c.d_v
    if n_per_key_head % n_model == 0:
        return n_key_head, n_per_key_head // n_model, c.d_v
    if c.head_type != "mqa" and c.d_v % n_model == 0:
        return n_key_head, n_per_key_head, c.d_v // n_model
    return None


def why_not(config: TransformerConfig, device_kind: str, n_model: int = 1) -> str | None:
    """The reason why the kernels can't be used, in words that follow "since"; None if they can.

    n_model: devices that heads, or one head's values, are sharded over. On a CPU everything that they can compute is
    allowed, for tests.
    """
    c = config
    if c.attn_type != "vq":
        return f"config.model.attn_type={c.attn_type} has no codes"
    if c.mem_len != c.block_len:
        return f"config.model.mem_len={c.mem_len} differs from config.model.block_len={c.block_len}"
    of_device = _on_a_device(c, n_model)
    if of_device is None:
        width = "" if c.head_type == "mqa" else f", nor config.model.d_v={c.d_v}"
        return f"config.mesh.model={n_model} does not divide config.model.n_head={c.n_head}{width}"
    if device_kind == "cpu":
        return None
    if device_kind not in CORES:
        return f"there are no kernels for {device_kind}, only for {', '.join(CORES)}"
    for name, divisor in DIVISORS.items():
        size = getattr(c, name)
        if size % divisor:
            return f"config.model.{name}={size} is not a multiple of {divisor}, as {device_kind} requires"
    n_key_head, n_per_key_head, d_v = of_device
    if d_v % 64:
        return (
            f"config.model.d_v={c.d_v} leaves {d_v} columns per device, not a multiple of 64, as {device_kind} requires"
        )
    shape = shape_of(c, device_kind, (1, 1, n_key_head, n_per_key_head, c.block_len, c.d_k), d_v, c.head_type == "shga")
    x, there = Dtypes(shape.dtype), shape.core.usable_bytes
    needed = max(operands(sized(shape, operands, x), x).needed_bytes(sized(shape, operands, x)) for operands in KERNELS)
    if needed > there:
        return f"a block takes {needed / MIB:.0f} MiB of VMEM, and {device_kind} has {there / MIB:.0f}"
    return None


def why_auto_takes_xla(config: TransformerConfig, device_kind: str, n_model: int = 1) -> str | None:
    """Like `why_not`, for `config.attention=auto`; it also gives a reason if the kernels would not be faster according
    to plan."""
    if "TPU" not in device_kind:
        return f"{device_kind} is not a TPU"
    if reason := why_not(config, device_kind, n_model):
        return reason
    return None if CORES[device_kind].can_turn else f"kernels are no faster on {device_kind}"


def implementation(config: TransformerConfig) -> str:
    """The implementation, plain, xla or pallas, of attention of attn_type vq under the current placement (axes.py): the
    one in `config.attention`; auto takes pallas, or xla if there is a reason."""
    if config.attn_type != "vq" or config.attention != "auto":
        return config.attention if config.attn_type == "vq" else "xla"
    place = placement()
    return "xla" if why_auto_takes_xla(config, place.device_kind(), place.n_shards("heads")) else "pallas"
