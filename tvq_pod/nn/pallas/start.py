"""What the kernels start with, made by XLA: counts, positions, and the state before the first block of every shard.

Where the blocks of an update are spread over devices, the kernels of each run from the state that its shard starts
with (sequence.py). So nothing is added to the caches of a shard's blocks afterwards: what the shards before it leave
enters as the first sum.
"""

import functools

import jax
import jax.numpy as jnp

from tvq_pod.nn.axes import placement
from tvq_pod.nn.cache import caches, count_leaving, counts_of_shard, log_counts
from tvq_pod.nn.pallas.tile import silu
from tvq_pod.nn.sequence import at_shard, exclusive_scan, of_last_shard
from tvq_pod.nn.state import doc_positions, next_state, state_axes
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.nn.window import leaving_chunks


def start(config: TransformerConfig, present: dict, state: dict, is_gated: bool) -> tuple[dict, dict]:
    """present, state: see `fused_attention` in core.py. is_gated: values are still to be activated.

    Returns operands of the kernels: k_window [N, B, H, M, K], v_window [N, B, H, M, V], positions and kept; with
    agg_cache first_mean [N, B, H, S, V] and first_count [N, B, H, 1, S], whose product is the first sum, and what is
    made of counts. And the state after the last block, in which the cache's means are those before the update if there
    is one shard.
    """
    c = config
    heads, value = c.value_names
    axes, blocks, of_shard = state_axes(c), ("blocks", "batch"), ("shards", "batch", heads)
    codes = (*blocks, heads, "token")
    in_axes = dict(z=codes, k_hat=(*codes, "key"), v=(*codes, value), doc_ids=(*blocks, "token")), axes
    of_counts = (*blocks, heads, None, "codes")
    out_axes = dict(
        k_window=(*of_shard, "window", "key"),
        v_window=(*of_shard, "window", value),
        positions=(*blocks, None, "token"),
        kept=blocks,
    )
    if c.agg_cache:
        out_axes |= dict(
            **dict.fromkeys(("log_counts", "inverse", "inverse_after"), of_counts),
            sees_cache=(*blocks, None, "token"),
            leaving=(*blocks, heads, None, "token"),
            first_mean=(*of_shard, "codes", value),
            first_count=(*of_shard, None, "codes"),
        )
    mapped = placement().over_blocks(functools.partial(_start, c, is_gated), in_axes, (out_axes, axes))
    started, new_state = mapped(present, state)
    if not c.grad_thru_cache:
        started = jax.lax.stop_gradient(started)
    return started, new_state


def _start(c: TransformerConfig, is_gated: bool, present: dict, state: dict, axis: str | None) -> tuple[dict, dict]:
    """`start`, of one shard."""
    ids_alone = state | dict(xlcache=dict(doc_ids=state["xlcache"]["doc_ids"]))
    last = {name: x[-1] for name, x in present.items()}  # mem_len = block_len: the window after the blocks
    own_next = next_state(dict(doc_ids=present["doc_ids"]), ids_alone)
    own_next["xlcache"] = last | dict(v=_activated(last["v"], is_gated))
    state, new_state = at_shard(state, own_next, present, axis)
    window, cache, positions = state["xlcache"], state["aggcache"], doc_positions(state, present["doc_ids"])
    started = dict(k_window=_of_shard(window["k_hat"], axis), v_window=_of_shard(window["v"], axis))
    started |= dict(positions=positions[:, :, None])

    leaving = leaving_chunks(window, present, ("z", "doc_ids"))
    if axis is None:
        latest, kept, z, counts = count_leaving(cache["latest_doc_id"], cache["lower"], leaving, c.reduction)
        first_mean, first_count = cache["upper_div_lower"], counts[0]
        after = cache | dict(lower=counts[-1], latest_doc_id=latest[-1])
    else:
        latest, kept, z, counts, lower_after = counts_of_shard(cache, leaving, c.reduction, axis)
        of_last_document = jnp.where((latest[1:] == latest[-1:])[:, :, None, None], z, -1)
        total = _leaving_sums(of_last_document, window["v"], present["v"], c.n_code, is_gated)
        first_sums = cache["upper_div_lower"] * cache["lower"][..., None]
        first_mean, sums_after = exclusive_scan(first_sums, total, latest[-1] == latest[0], axis)
        first_count = jnp.ones_like(counts[0])  # what came is the sum already
        after = dict(
            upper_div_lower=sums_after / jnp.maximum(lower_after, 1.0)[..., None],
            lower=lower_after,
            latest_doc_id=of_last_shard(latest[-1], axis),
        )
    started |= dict(kept=kept.astype(jnp.int32))
    if not c.agg_cache:
        v = _activated(present["v"], is_gated)
        _, after = caches(cache, leaving_chunks(window, present | dict(v=v)), c.reduction, axis)
        return started, new_state | dict(aggcache=after)
    inverse = 1.0 / jnp.maximum(counts, 1.0)
    started |= dict(
        sees_cache=(present["doc_ids"] == latest[:-1, :, None]).astype(jnp.int32)[:, :, None],
        log_counts=log_counts(counts[:-1])[:, :, :, None],
        leaving=z[:, :, :, None],
        inverse=inverse[:-1, :, :, None],
        inverse_after=inverse[1:, :, :, None],
        first_mean=_of_shard(first_mean, axis),
        first_count=_of_shard(first_count[:, :, None], axis),
    )
    return started, new_state | dict(aggcache=after)


def _activated(v: jax.Array, is_gated: bool) -> jax.Array:
    return silu(v).astype(v.dtype) if is_gated else v


def _of_shard(x: jax.Array, axis: str | None) -> jax.Array:
    """x with an axis N in front. axis None: of all shards, whose shapes alone are asked for unless there is one."""
    return jnp.broadcast_to(x, (1 if axis else placement().n_shards("blocks"), *x.shape))


@functools.partial(jax.checkpoint, static_argnums=(3, 4))  # what is kept for the backward pass is no larger than v
def _leaving_sums(z: jax.Array, v_window: jax.Array, v: jax.Array, n_code: int, is_gated: bool) -> jax.Array:
    """The sum for each code of the values that leave during a shard's blocks, float32 [B, H, S, V].

    z: [R, B, H, L], of each chunk's tokens, -1 for those that do not count. v_window: [B, H, L, V], the first chunk.
    v: [R, B, H, L, V], of the blocks, of which all but the last leave.
    """
    dot = functools.partial(jnp.einsum, "bhts,bhtv->bhsv", preferred_element_type=jnp.float32)

    def onehot(z):  # one for each matmul: XLA makes it where it is used, and holds none
        return jax.nn.one_hot(z, n_code, dtype=v.dtype)

    total = dot(onehot(z[0]), v_window)
    if len(v) > 1:
        total += dot(onehot(_joined(z[1:])), _joined(_activated(v[:-1], is_gated)))
    return total


def _joined(x: jax.Array) -> jax.Array:
    """[R, B, H, L, ...] -> [B, H, R L, ...]: one sum over all tokens."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
