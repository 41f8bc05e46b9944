"""The kernels' initial inputs, computed by XLA: counts, positions, and the state before the first block of every shard.

If the blocks of an update are sharded over devices, the kernels of each run from the state that its shard starts with
(sequence.py). So nothing is added to the caches of a shard's blocks afterward: the cache after the earlier shards
enters as the first sum.
"""

import functools

import jax
import jax.numpy as jnp

from tvq_pod.nn.axes import placement
from tvq_pod.nn.cache import caches, count_leaving, counts_of_shard, log_counts
from tvq_pod.nn.pallas.fit import shape_of, sized
from tvq_pod.nn.pallas.leaving import gradient_operands, leaving_gradient, leaving_sums, sums_operands
from tvq_pod.nn.pallas.tile import silu
from tvq_pod.nn.sequence import at_shard, exclusive_scan, of_last_shard
from tvq_pod.nn.state import axes_of_attention, doc_positions, next_state
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.nn.window import leaving_chunks


def start(
    config: TransformerConfig, present: dict, state: dict, is_gated: bool, stacked: dict | None = None
) -> tuple[dict, dict]:
    """Computes the inputs. present, state: see `fused_attention` in core.py. is_gated: values are not activated yet.
    stacked: if the values are in a stack over layers, v for all layers, and layer, int32 [1]: kernels read them from
    there.

    Returns operands of the kernels: k_window [N, B, H, M, K], v_window [N, B, H, M, V], positions and kept; with
    agg_cache first_mean [N, B, H, S, V] and first_count [N, B, H, 1, S], whose product is the first sum, and arrays
    derived from counts. Also returns the state after the last block, in which the cache's means are those before the
    update if there is one shard.
    """
    c = config
    heads, value = c.value_names
    axes, blocks, of_shard = axes_of_attention(c), ("blocks", "batch"), ("shards", "batch", heads)
    codes = (*blocks, heads, "token")
    of_present: dict[str, tuple] = dict(z=codes, k_hat=(*codes, "key"), v=(*codes, value), doc_ids=(*blocks, "token"))
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
    if placement().n_shards("blocks") > 1:
        v, z, doc_ids = (present[name] for name in ("v", "z", "doc_ids"))
        present = present | dict(own_total=own_sums(c, is_gated, v, z, doc_ids, stacked or {}))
        of_present["own_total"] = (*of_shard, "codes", value)
    mapped = placement().over_blocks(functools.partial(_start, c, is_gated), (of_present, axes), (out_axes, axes))
    started, new_state = mapped(present, state)
    if not c.grad_thru_cache:
        started = jax.lax.stop_gradient(started)
    return started, new_state


def _start(c: TransformerConfig, is_gated: bool, present: dict, state: dict, axis: str | None) -> tuple[dict, dict]:
    """`start`, for one shard."""
    ids_alone = state | dict(xlcache=dict(doc_ids=state["xlcache"]["doc_ids"]))
    own_total = present.get("own_total")  # [1, B, H, S, V], if there are several shards
    present = {name: x for name, x in present.items() if name != "own_total"}
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
        assert own_total is not None
        latest, kept, z, counts, lower_after = counts_of_shard(cache, leaving, c.reduction, axis)
        # the chunk that leaves first is the window, which the previous shard has computed
        of_last_document = jnp.where((latest[1] == latest[-1])[:, None, None], z[0], -1)
        onehot = jax.nn.one_hot(of_last_document, c.n_code, dtype=window["v"].dtype)
        total = jnp.einsum("bhls,bhlv->bhsv", onehot, window["v"], preferred_element_type=jnp.float32)
        total = total + own_total[0]
        first_sums = cache["upper_div_lower"] * cache["lower"][..., None]
        first_mean, sums_after = exclusive_scan(first_sums, total, latest[-1] == latest[0], axis)
        first_count = jnp.ones_like(counts[0])  # `first_mean` is already a sum
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
    """x with a leading axis N. axis None: for all shards; unless there is one, only the shapes matter."""
    return jnp.broadcast_to(x, (1 if axis else placement().n_shards("blocks"), *x.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def own_sums(
    config: TransformerConfig, is_gated: bool, v: jax.Array, z: jax.Array, doc_ids: jax.Array, stacked: dict
) -> jax.Array:
    """The sum for each code of a shard's own values that leave during its blocks, which are those of all its blocks
    except the last, in the document of the last of these. Float32 [N, B, H, S, V].

    v [N R, B, H, L, V], z [N R, B, H, L], doc_ids [N R, B, L]; stacked: see `start`.
    """
    x = dict(v=v, z=z, doc_ids=doc_ids) | stacked
    return _on_shards(config, is_gated, leaving_sums, sums_operands, x)["total"]


def _own_sums_forward(config, is_gated, v, z, doc_ids, stacked):
    return own_sums(config, is_gated, v, z, doc_ids, stacked), (v, z, doc_ids, stacked)


def _own_sums_backward(config, is_gated, kept, d_total):
    v, z, doc_ids, stacked = kept
    x = dict(v=v, z=z, doc_ids=doc_ids) | stacked | dict(d_total=d_total.astype(v.dtype))
    made = _on_shards(config, is_gated, leaving_gradient, gradient_operands, x)
    return made["v_gradient"], None, None, None


own_sums.defvjp(_own_sums_forward, _own_sums_backward)


def _on_shards(config: TransformerConfig, is_gated: bool, function, operands, x: dict) -> dict:
    """Runs a kernel of leaving.py on each device's part. x: v, or a stack with layer; z; doc_ids; d_total."""
    heads, value = config.value_names
    blocks, device_kind = ("blocks", "batch", heads), placement().device_kind()
    n_shards, n_blocks = placement().n_shards("blocks"), len(x["z"])
    axes = dict(
        **dict.fromkeys(("v", "v_gradient"), (*blocks, "token", value)),
        z=(*blocks, "token"),
        doc_ids=("blocks", "batch", "token"),
        **dict.fromkeys(("total", "d_total"), ("shards", "batch", heads, "codes", value)),
        layer=(None,),
    )

    def axes_with_layers(name, array):
        return ("layers", *axes[name]) if array.ndim > len(axes[name]) else axes[name]

    def of_device(x):
        own = {name: array for name, array in x.items() if name not in ("z", "doc_ids")}
        ids, z = x["doc_ids"], x["z"]
        counted = ids[:-1] == ids[-2:-1, :, -1:]  # no token of the last block leaves
        leaving = jnp.concatenate([jnp.where(counted[:, :, None], z[:-1], -1), jnp.full_like(z[:1], -1)])
        own |= dict(leaving=leaving[:, :, :, None], kept=jnp.ones(leaving.shape[:2], jnp.int32))
        if "d_total" in own:
            own["d_total"] = own["d_total"][0]
        q_shape = *leaving.shape[:3], 1, leaving.shape[3], config.d_k
        shape = shape_of(config, device_kind, q_shape, own["v"].shape[-1], is_gated)
        made = function(sized(shape, operands, own), own)
        n_here = n_shards * len(z) // n_blocks  # all, where only the shapes matter
        return {name: jnp.broadcast_to(a, (n_here, *a.shape)) if name == "total" else a for name, a in made.items()}

    return placement().on_each_device(of_device, axes_with_layers)(x)
