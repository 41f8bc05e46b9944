"""Blocks and their windows: how an update is cut, and which tokens precede each block.

The window is the last M tokens that were read. An update is R blocks of L tokens, laid out as [R, B, ...]: so the
window of block r is mostly block r - 1 of the same array, which costs no copy. The code here does not depend on what
attention does with either, or on how the cache counts the tokens that leave (cache.py).

Names, in `xlcache` and in `present` alike: z (shortcodes), k_hat (quantized keys; exact ones with attn_type full), v,
doc_ids. `xlcache` is the window of the state: z [B, H, M], k_hat [B, H, M, K], v [B, H, M, V], doc_ids [B, M].
`present` is the blocks of the update: z [R, B, H, L], k_hat [R, B, H, L, K], v [R, B, H, L, V], doc_ids [R, B, L].
"""

import jax
import jax.numpy as jnp

TOKEN_AXIS = dict(z=2, k_hat=2, v=2, doc_ids=1)  # in the window; one more in blocks


def split_blocks(x: jax.Array, block_len: int) -> jax.Array:
    """Reshapes [B, T, ...] to [R, B, L, ...]."""
    return jnp.swapaxes(x.reshape(len(x), -1, block_len, *x.shape[2:]), 0, 1)


def join_blocks(x: jax.Array) -> jax.Array:
    """Reshapes [R, B, L, ...] to [B, T, ...]."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def extend_window(xlcache: dict, present: dict) -> dict:
    """The window followed by the blocks, as one sequence of M + T tokens: [B, H, M + T, ...], doc_ids [B, M + T]."""

    def extended(name, window):
        axis = TOKEN_AXIS[name]
        blocks = jnp.moveaxis(present[name], 0, axis)  # [B, H, R, L, ...]
        blocks = blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
        return jnp.concatenate([window, blocks], axis=axis)

    return {name: extended(name, window) for name, window in xlcache.items()}


def window_of_blocks(xlcache: dict, present: dict) -> dict:
    """The window of each block: k_hat and v [R, B, H, P, ...]. P is M; for several blocks, it is M rounded up to full
    blocks, and the last M columns are the window."""
    n_blocks = len(present["doc_ids"])

    def past(name):
        if n_blocks == 1:
            return xlcache[name][None]
        whole = _window_then_blocks(name, xlcache, present)
        pieces = [whole[n : n + n_blocks] for n in range(len(whole) - n_blocks)]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=TOKEN_AXIS[name] + 1)

    return {name: past(name) for name in ("k_hat", "v")}


def leaving_chunks(xlcache: dict, present: dict, names: tuple[str, ...] = ("z", "v", "doc_ids")) -> dict:
    """The tokens that leave the window after each block: z and v [R, B, H, L, ...], doc_ids [R, B, L]."""
    n_blocks, _, block_len = present["doc_ids"].shape
    mem_len = xlcache["doc_ids"].shape[1]

    def leaving(name):
        axis = TOKEN_AXIS[name]
        if n_blocks == 1:
            recent = jnp.concatenate([xlcache[name], present[name][0]], axis=axis)
            return jax.lax.slice_in_dim(recent, 0, block_len, axis=axis)[None]
        whole = _window_then_blocks(name, xlcache, present)
        rest = -mem_len % block_len  # leading zeros: a chunk begins this many tokens into a block
        if not rest:
            return whole[:n_blocks]
        parts = [
            jax.lax.slice_in_dim(whole[:n_blocks], rest, None, axis=axis + 1),
            jax.lax.slice_in_dim(whole[1 : n_blocks + 1], 0, rest, axis=axis + 1),
        ]
        return jnp.concatenate(parts, axis=axis + 1)

    return {name: leaving(name) for name in names}


def next_window(xlcache: dict, present: dict) -> dict:
    """The window after the blocks: an `xlcache` of the last M tokens."""
    n_blocks, mem_len = len(present["doc_ids"]), xlcache["doc_ids"].shape[1]

    def last_ones(name):
        axis = TOKEN_AXIS[name]
        if n_blocks == 1:
            recent = jnp.concatenate([xlcache[name], present[name][0]], axis=axis)
        else:
            whole = _window_then_blocks(name, xlcache, present)
            recent = jnp.moveaxis(whole[n_blocks:], 0, axis)  # [B, H, P / L, L, ...]
            recent = recent.reshape(*recent.shape[:axis], -1, *recent.shape[axis + 2 :])
        return jax.lax.slice_in_dim(recent, recent.shape[axis] - mem_len, None, axis=axis)

    return {name: last_ones(name) for name in xlcache}


def _window_then_blocks(name: str, xlcache: dict, present: dict) -> jax.Array:
    """The window as full blocks, oldest first, and the blocks: [P / L + R, B, H, L, ...], with zeros before the
    window's first token.

    Users always slice from this array: XLA does not copy it, as it would copy a concatenation of slices.
    """
    axis, window, blocks = TOKEN_AXIS[name], xlcache[name], present[name]
    block_len = blocks.shape[axis + 1]
    window = jnp.pad(window, [(-window.shape[axis] % block_len if n == axis else 0, 0) for n in range(window.ndim)])
    before = jnp.moveaxis(window.reshape(*window.shape[:axis], -1, block_len, *window.shape[axis + 1 :]), axis, 0)
    return jnp.concatenate([before, blocks])
