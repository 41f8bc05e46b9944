"""Whether a config can use the kernels on a kind of device, and with which sizes; said before anything is compiled."""

import jax
import jax.numpy as jnp

from tvq_pod.nn.pallas.backward import backward_operands
from tvq_pod.nn.pallas.call import Shape
from tvq_pod.nn.pallas.forward import forward_operands
from tvq_pod.nn.types import TransformerConfig

MIB = 2**20
VMEM_BYTES = {  # of a core, by what JAX calls the device; v2 to v4 have no rotate by another shift in every row
    "TPU v5 lite": 128 * MIB,
    "TPU v5": 64 * MIB,
    "TPU v6 lite": 128 * MIB,
    "TPU7x": 64 * MIB,
}
TILES = (256, 128)  # queries at a time, the best first
DIVISORS = dict(block_len=128, n_code=64, d_k=8, d_v=64)  # queries and keys of a block are rotated by lanes, of 128


def shape_of(config: TransformerConfig, device_kind: str, n_blocks: int, n_rows: int, is_gated: bool) -> Shape:
    """What the kernels are compiled for. On a TPU, the first of TILES that divides the block and fits; elsewhere half a
    block, if it has a half, so that tests see several tiles."""
    c = config
    tile, vmem_bytes = (c.block_len // 2 if c.block_len % 2 == 0 else c.block_len), 0
    if device_kind in VMEM_BYTES:
        vmem_bytes = VMEM_BYTES[device_kind] * 7 // 8
        tiles = [tile for tile in TILES if c.block_len % tile == 0] or [c.block_len]
        tile = next((tile for tile in tiles if _needed_bytes(c, tile) <= vmem_bytes), tiles[-1])
    return _shape(c, tile, n_blocks, n_rows, is_gated, device_kind not in VMEM_BYTES, vmem_bytes)


def _shape(c: TransformerConfig, tile: int, n_blocks: int, n_rows: int, is_gated, interpret, vmem_bytes) -> Shape:
    return Shape(
        n_blocks=n_blocks,
        n_rows=n_rows,
        n_key_head=c.n_key_head,
        n_per_key_head=c.n_head // c.n_key_head,
        block_len=c.block_len,
        n_code=c.n_code,
        d_k=c.d_k,
        d_v=c.d_v,
        dtype=jnp.dtype(c.dtype),
        tile=tile,
        window_bias=c.window_bias,
        has_cache=c.agg_cache,
        through_cache=c.grad_thru_cache,
        is_gated=is_gated,
        interpret=interpret,
        vmem_bytes=vmem_bytes,
    )


def _needed_bytes(config: TransformerConfig, tile: int) -> int:
    """An estimate, from above, of what the larger of the kernels takes of VMEM."""
    shape = _shape(config, tile, 1, 1, config.head_type == "shga", False, 0)
    x = _Dtypes(shape.dtype)
    return max(operands(shape, x).needed_bytes(shape) for operands in (forward_operands, backward_operands))


class _Dtypes(dict):
    """For each operand's name, something that has its dtype, which is all that counts for its size in VMEM."""

    OTHERS = dict(
        **dict.fromkeys(("positions", "sees_cache", "leaving"), jnp.int32),
        **dict.fromkeys(("log_counts", "inverse", "inverse_after", "first_mean", "first_count"), jnp.float32),
        **dict.fromkeys(("inverse_last", "log_total"), jnp.float32),
    )

    def __init__(self, dtype):
        super().__init__()
        self._dtype = dtype

    def __getitem__(self, name):
        return jax.ShapeDtypeStruct((), self.OTHERS.get(name, self._dtype))


def why_not(config: TransformerConfig, device_kind: str, n_model: int = 1, n_sequence: int = 1) -> str | None:
    """Why the kernels can't be used, in words that follow "since"; None if they can.

    n_model, n_sequence: devices that heads, or one head's values, and an update's blocks are spread over. On a CPU
    anything goes that they can compute: it is for tests.
    """
    c = config
    if c.attn_type != "vq":
        return f"config.model.attn_type={c.attn_type} has no codes"
    if c.mem_len != c.block_len:
        return f"config.model.mem_len={c.mem_len} differs from config.model.block_len={c.block_len}"
    if n_sequence > 1:
        return f"config.mesh.sequence={n_sequence} spreads an update over devices"
    if n_model > 1 and (c.n_key_head == 1 or c.n_key_head % n_model):
        return f"config.mesh.model={n_model} does not divide {c.n_key_head} key head(s)"
    if device_kind == "cpu":
        return None
    if device_kind not in VMEM_BYTES:
        return f"there are no kernels for {device_kind}, only for {', '.join(VMEM_BYTES)}"
    for name, divisor in DIVISORS.items():
        size = getattr(c, name)
        if size % divisor:
            return f"config.model.{name}={size} is not a multiple of {divisor}, as {device_kind} wants it"
    there = VMEM_BYTES[device_kind] * 7 // 8
    needed = min(_needed_bytes(c, tile) for tile in TILES if c.block_len % tile == 0)
    if needed > there:
        return f"a block takes {needed / MIB:.0f} MiB of VMEM, of which {device_kind} has {there / MIB:.0f}"
    return None


def implementation(config: TransformerConfig) -> str:
    """Which of plain, xla and pallas computes attention of attn_type vq: what `config.attention` says. auto is xla: the
    kernels have been compiled for TPUs, and have not run on one yet."""
    return config.attention if config.attn_type == "vq" and config.attention != "auto" else "xla"
