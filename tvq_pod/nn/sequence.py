"""An update whose blocks are spread over devices: what a shard must know of those before it.

Inside shard_map every device has R / n of the blocks, and runs the same program as one that has them all, from the
state that it would have at its first block. That state is made here, with communication that does not grow with T:

- the window is the last M tokens of the shard before: one `ppermute` (the shard must have M tokens at least);
- positions and the cache's document follow from one number each a shard, gathered;
- the cache's counts and sums are an exclusive scan over shards of (document, count, sum). Every shard adds its own
  chunks from zero; an all-to-all gives each device one part of the codes of all shards, whose recurrence (see cache.py)
  it solves; a second all-to-all brings back what comes before each shard. That sends 2 S V numbers a row and head,
  where a scan by doubling sends S V log2 n. The cache after the last shard needs no sending: states have their codes
  spread over the axis.

Everything is differentiable, the gradients go the same ways back.
"""

import math

import jax
import jax.numpy as jnp

LANES = 128  # of a TPU's tile


def at_shard(state: dict, own_next: dict, present: dict, axis: str | None) -> tuple[dict, dict]:
    """The state that this shard starts with, and what the update leaves behind, both but for the cache (see cache.py).

    state: before the update. own_next: like it, after this shard's blocks `present`, as if they were all.
    """
    if axis is None:
        return state, own_next
    last_id, own_last_id = state["xlcache"]["doc_ids"][:, -1], present["doc_ids"][-1, :, -1]
    n_last = jnp.sum(present["doc_ids"] == own_last_id[None, :, None], axis=(0, 2), dtype=jnp.int32)
    pos_offset = position_before(state["pos_offset"], last_id, own_last_id, n_last, axis)
    after = n_last + jnp.where(last_id_before(last_id, own_last_id, axis) == own_last_id, pos_offset, 0)
    is_first, window = first_shard(axis), own_next["xlcache"]
    return (
        state
        | dict(
            pos_offset=pos_offset,
            xlcache={
                name: jnp.where(is_first, x, from_shard_before(window[name], axis))
                for name, x in state["xlcache"].items()
            },
        ),
        dict(
            pos_offset=of_last_shard(after, axis),
            xlcache={name: of_last_shard(x, axis) for name, x in window.items()},
        ),
    )


def last_id_before(last_id: jax.Array, own_last_id: jax.Array, axis: str) -> jax.Array:
    """Document of the last token before this shard, [B]."""
    return jnp.where(first_shard(axis), last_id, from_shard_before(own_last_id, axis))


def varying_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, typed as an array that differs from device to device along the mapped axes that `other` does: what a scan
    carries must say so from the start."""
    return jnp.where(other.ravel()[0] > 0, x, x)


def first_shard(axis: str) -> jax.Array:
    """Whether this is it, a boolean scalar."""
    return jax.lax.axis_index(axis) == 0


def from_shard_before(x: jax.Array, axis: str) -> jax.Array:
    """x of the shard before; zeros on the first."""
    n_shards = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(n, n + 1) for n in range(n_shards - 1)])


def of_last_shard(x: jax.Array, axis: str) -> jax.Array:
    """x of the last shard, on all of them."""
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), axis)


def position_before(pos_offset, last_id, own_last_id, n_last, axis: str) -> jax.Array:
    """Tokens read before this shard of the document that it starts in, if that one continues, [B].

    pos_offset, last_id [B]: of the state, tokens read of its document, and its id. own_last_id, n_last [B]: of this
    shard, the document of its last token, and its tokens of that.
    """
    ids = jnp.concatenate([last_id[None], jax.lax.all_gather(own_last_id, axis)])  # [1 + n, B]
    counts = jnp.concatenate([pos_offset[None], jax.lax.all_gather(n_last, axis)])
    shard = jax.lax.axis_index(axis)
    # ids never decrease: the shards that end in one document are neighbours
    is_before = jnp.arange(len(ids))[:, None] <= shard
    return jnp.sum(jnp.where((ids == ids[shard][None]) & is_before, counts, 0), axis=0)


def exclusive_scan(first, total, keep, axis: str):
    """The linear recurrence x_{s+1} = keep_s x_s + total_s over shards.

    first [B, H, S / n, ...]: x_0, this device's part of the codes. total [B, H, S, ...]: of this shard. keep [B] bool:
    of this shard. Returns x_s [B, H, S, ...] of this shard, and its part [B, H, S / n, ...] of x_n.
    """
    own_shape = first.shape
    n_shards = jax.lax.axis_size(axis)
    totals = jax.lax.all_to_all(_parts(total, n_shards), axis, 0, 0)
    keeps = jax.lax.all_gather(keep, axis)
    # document of each x: a new one wherever nothing is kept
    segment = jnp.concatenate([jnp.zeros_like(keep[None], jnp.int32), jnp.cumsum(~keeps, axis=0, dtype=jnp.int32)])
    n = jnp.arange(n_shards + 1)
    # x_s has the totals of the shards before it, and x_0, as far as their document continues until there
    has_total = (segment[:, None] == segment[None, 1:]) & (n[:, None] > n[None, :-1])[..., None]
    has_first = (segment == segment[:1]).astype(first.dtype)
    first = _rows(first, 2)

    def sums(of: slice):
        own = has_first[of].reshape(*has_first[of].shape, *[1] * (first.ndim - 1)) * first[None]
        terms = has_total[of].astype(first.dtype)
        return own + jnp.einsum("tsb,sb...->tb...", terms, totals, precision="highest")

    before = jnp.moveaxis(jax.lax.all_to_all(sums(slice(n_shards)), axis, 0, 0), 0, 2)
    return before.reshape(total.shape), sums(slice(n_shards, None))[0].reshape(own_shape)


def _parts(total: jax.Array, n_shards: int) -> jax.Array:
    """[B, H, S, ...] -> [n, B, H, S / n, ...], of every shard's codes one part; but see `_rows`."""
    parts = total.reshape(*total.shape[:2], n_shards, -1, *total.shape[3:])
    return jnp.moveaxis(_rows(parts, 3), 2, 0)


def _rows(x: jax.Array, axis: int) -> jax.Array:
    """x with all axes from this one on as rows of LANES numbers, if they are as many: a device's few codes would fill
    a part of a TPU's tile alone, and every pass over them take as long as over whole tiles."""
    size = math.prod(x.shape[axis:])
    return x.reshape(*x.shape[:axis], -1, LANES) if size % LANES == 0 else x
