"""An update whose blocks are sharded over devices: the data that a shard needs from earlier shards.

Inside shard_map every device has R / n of the blocks, and runs the same program as a device with all of them, from the
state that it would have at its first block. That state is computed here, with communication that does not grow with T:

- the window is the last M tokens of the previous shard: one `ppermute` (a shard must have at least M tokens); -
positions and the cache's document follow from one gathered number each per shard; - the cache's counts and sums are an
exclusive scan over shards of (document, count, sum). Every shard adds its own
  chunks from zero; an all-to-all gives each device one part of the codes of all shards, whose recurrence (see cache.py)
  it solves; a second all-to-all returns the total before each shard. This sends 2 S V numbers per row and head, while a
  scan by doubling sends S V log2 n. The cache after the last shard is not sent: states have their codes sharded over
  the axis.

Everything is differentiable; the gradients take the same paths back.
"""

import math

import jax
import jax.numpy as jnp

LANES = 128  # of a TPU's tile


def at_shard(state: dict, own_next: dict, present: dict, axis: str | None) -> tuple[dict, dict]:
    """The state that this shard starts with, and the state after the update, both without the cache (see cache.py).

    state: the one before the update. own_next: the one after this shard's blocks `present`, as if they were all.
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
    """The document of the last token before this shard, [B]."""
    return jnp.where(first_shard(axis), last_id, from_shard_before(own_last_id, axis))


def varying_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, typed as an array that varies over the same mapped axes as `other`: the carry of a scan must have this type
    from the start."""
    return jnp.where(other.ravel()[0] > 0, x, x)


def first_shard(axis: str) -> jax.Array:
    """Whether this is the first shard, a boolean scalar."""
    return jax.lax.axis_index(axis) == 0


def from_shard_before(x: jax.Array, axis: str) -> jax.Array:
    """The x of the previous shard; zeros on the first."""
    n_shards = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(n, n + 1) for n in range(n_shards - 1)])


def of_last_shard(x: jax.Array, axis: str) -> jax.Array:
    """The x of the last shard, on all shards."""
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), axis)


def position_before(pos_offset, last_id, own_last_id, n_last, axis: str) -> jax.Array:
    """The number of tokens before this shard in the document that it starts in, if that document continues, [B].

    pos_offset, last_id [B]: the state's number of tokens read of its document, and the document's id. own_last_id,
    n_last [B]: the document of this shard's last token, and the number of the shard's tokens in it.
    """
    ids = jnp.concatenate([last_id[None], jax.lax.all_gather(own_last_id, axis)])  # [1 + n, B]
    counts = jnp.concatenate([pos_offset[None], jax.lax.all_gather(n_last, axis)])
    shard = jax.lax.axis_index(axis)
    # ids never decrease: the shards that end in the same document are neighbors
    is_before = jnp.arange(len(ids))[:, None] <= shard
    return jnp.sum(jnp.where((ids == ids[shard][None]) & is_before, counts, 0), axis=0)


def exclusive_scan(first, total, keep, axis: str):
    """Solves the linear recurrence x_{s+1} = keep_s x_s + total_s over shards.

    first [B, H, S / n, ...]: x_0, for this device's part of the codes. total [B, H, S, ...], keep [B] bool: this
    shard's. Returns this shard's x_s [B, H, S, ...], and its part [B, H, S / n, ...] of x_n.
    """
    own_shape = first.shape
    n_shards = jax.lax.axis_size(axis)
    totals = jax.lax.all_to_all(_parts(total, n_shards), axis, 0, 0)
    keeps = jax.lax.all_gather(keep, axis)
    # the document of each x: a new one wherever x is not kept
    segment = jnp.concatenate([jnp.zeros_like(keep[None], jnp.int32), jnp.cumsum(~keeps, axis=0, dtype=jnp.int32)])
    n = jnp.arange(n_shards + 1)
    # x_s has x_0 and the totals of earlier shards if their document continues up to s
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
    """Splits the codes of [B, H, S, ...] into one part per shard, [n, B, H, S / n, ...]; but see `_rows`."""
    parts = total.reshape(*total.shape[:2], n_shards, -1, *total.shape[3:])
    return jnp.moveaxis(_rows(parts, 3), 2, 0)


def _rows(x: jax.Array, axis: int) -> jax.Array:
    """Reshapes the axes of x from this one on to rows of LANES numbers, if their size is a multiple: a device's few
    codes would fill only a part of a TPU's tile, and every pass over them would take as long as over full tiles."""
    size = math.prod(x.shape[axis:])
    return x.reshape(*x.shape[:axis], -1, LANES) if size % LANES == 0 else x
