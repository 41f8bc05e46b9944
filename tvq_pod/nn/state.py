"""The state of one attention layer, which a stream carries from block to block and from update to update.

It is a dict: the window (`xlcache`, see window.py), the cache (`aggcache`, see cache.py), and `pos_offset`, the number
of tokens read of the current document; with key_shift also `before`, for the next key. VQAttention takes and returns
it; model.py stacks one for each layer. This file initializes it, names its axes, and computes the next one, whether the
blocks are on one device or sharded over several (sequence.py).
"""

import jax
import jax.numpy as jnp

from tvq_pod.nn.axes import placement
from tvq_pod.nn.cache import NO_DOC, caches, initial_cache
from tvq_pod.nn.sequence import at_shard
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.nn.window import join_blocks, leaving_chunks, next_window, split_blocks, window_of_blocks


def initial_state(config: TransformerConfig, batch_size: int) -> dict:
    """Returns the state of `batch_size` streams that have read nothing.

    pos_offset [B] int32: tokens read of the current document.
    xlcache: the window, oldest first: z [B, H, M] int32, k_hat [B, H, M, K] and v [B, H, M, V] in `dtype`,
      doc_ids [B, M] int32.
    aggcache: the cache, see `initial_cache`.
    before [B, H, K] in `dtype`, with key_shift: the last token's query, see `shifted`.
    With attn_type full there are no z and no aggcache.
    """
    c, n_head = config, config.n_key_head
    state = dict(
        pos_offset=jnp.zeros([batch_size], jnp.int32),
        xlcache=dict(
            z=jnp.zeros([batch_size, n_head, c.mem_len], jnp.int32),
            k_hat=jnp.zeros([batch_size, n_head, c.mem_len, c.d_k], c.dtype),
            v=jnp.zeros([batch_size, n_head, c.mem_len, c.d_v], c.dtype),
            doc_ids=jnp.full([batch_size, c.mem_len], NO_DOC, jnp.int32),
        ),
        aggcache=initial_cache(batch_size, n_head, c.n_code, c.d_v),
    )
    state = state if c.attn_type == "vq" else _without_cache(state)
    return state | (dict(before=jnp.zeros([batch_size, n_head, c.d_k], c.dtype)) if c.key_shift else {})


def state_axes(config: TransformerConfig) -> dict:
    """Returns the logical name of every axis of `initial_state`, in the same tree."""
    heads, _ = config.value_names
    return axes_of_attention(config) | (dict(before=("batch", heads, "key")) if config.key_shift else {})


def axes_of_attention(config: TransformerConfig) -> dict:
    """The `state_axes` of the parts that attention itself reads: all except `before`, which the projections need."""
    heads, value = config.value_names
    axes = dict(
        pos_offset=("batch",),
        xlcache=dict(
            z=("batch", heads, "window"),
            k_hat=("batch", heads, "window", "key"),
            v=("batch", heads, "window", value),
            doc_ids=("batch", "window"),
        ),
        aggcache=dict(
            upper_div_lower=("batch", heads, "cached_codes", value),
            lower=("batch", heads, "cached_codes"),
            latest_doc_id=("batch",),
        ),
    )
    return axes if config.attn_type == "vq" else _without_cache(axes)


def _without_cache(state: dict) -> dict:
    window = {name: leaf for name, leaf in state["xlcache"].items() if name != "z"}
    return dict(pos_offset=state["pos_offset"], xlcache=window)


def surroundings(config: TransformerConfig, present: dict, state: dict) -> tuple[dict, dict, jax.Array, dict]:
    """The data that the fast attention needs about the tokens before each block, and the state after the last one.

    Returns `window_of_blocks`, the `caches` that blocks attend to, `doc_positions`, and the next state.
    """

    def of_shard(present, state, axis):
        state, new_state = at_shard(state, next_state(present, state), present, axis)
        before, after = caches(state["aggcache"], leaving_chunks(state["xlcache"], present), config.reduction, axis)
        positions = doc_positions(state, present["doc_ids"])
        return window_of_blocks(state["xlcache"], present), before, positions, new_state | dict(aggcache=after)

    heads, value = config.value_names
    blocks, axes = ("blocks", "batch"), axes_of_attention(config)
    codes, values = (*blocks, heads, "token"), (*blocks, heads, "token", value)
    in_axes = dict(z=codes, k_hat=(*codes, "key"), v=values, doc_ids=(*blocks, "token")), axes
    past = dict(k_hat=(*codes, "key"), v=values)
    before = dict(
        upper_div_lower=(*blocks, heads, "codes", value), lower=(*blocks, heads, "codes"), latest_doc_id=blocks
    )
    with jax.named_scope("cache"):
        return placement().over_blocks(of_shard, in_axes, (past, before, (*blocks, "token"), axes))(present, state)


def next_state(present: dict, state: dict) -> dict:
    """Returns pos_offset and xlcache after the blocks `present`, without the cache."""
    doc_ids, last_before = present["doc_ids"], state["xlcache"]["doc_ids"][:, -1]
    last = doc_ids[-1, :, -1]
    n_present = jnp.sum(doc_ids == last[None, :, None], axis=(0, 2), dtype=jnp.int32)
    pos_offset = n_present + jnp.where(last_before == last, state["pos_offset"], 0)
    return dict(pos_offset=pos_offset, xlcache=next_window(state["xlcache"], present))


def shifted(q: jax.Array, doc_ids: jax.Array, state: dict) -> tuple[jax.Array, jax.Array]:
    """Returns, for each token, the query of the previous token, zeros where a document begins, [R, B, H, L, K]; and the
    next state's `before`. q [R, B, H, L, K], doc_ids [R, B, L]: those of the blocks after the tokens that `state` has
    read."""

    def before(of_tokens, first, axis):
        lasts = jax.lax.slice_in_dim(of_tokens, of_tokens.shape[axis] - 1, None, axis=axis)
        of_blocks = jnp.concatenate([jnp.expand_dims(first, axis - 1)[None], lasts[:-1]])
        rest = jax.lax.slice_in_dim(of_tokens, 0, of_tokens.shape[axis] - 1, axis=axis)
        return jnp.concatenate([of_blocks, rest], axis=axis)

    is_continued = before(doc_ids, state["xlcache"]["doc_ids"][:, -1], 2) == doc_ids
    of_before = before(q, state["before"], 3)
    return jnp.where(is_continued[:, :, None, :, None], of_before, jnp.zeros([], q.dtype)), q[-1, :, :, -1]


def doc_positions(state: dict, doc_ids: jax.Array) -> jax.Array:
    """The position of each token in its document, int32 [R, B, L]. doc_ids: [R, B, L], after the tokens that `state`
    has read."""
    block_len = doc_ids.shape[2]
    doc_ids = join_blocks(doc_ids)
    t = jnp.broadcast_to(jnp.arange(doc_ids.shape[1], dtype=jnp.int32), doc_ids.shape)
    # The running maximum is expensive. It has no state in it, so XLA computes it once for all units that it sees at
    # once.
    starts = jnp.where(doc_ids[:, 1:] != doc_ids[:, :-1], t[:, 1:], 0)
    start = jax.lax.cummax(jnp.pad(starts, ((0, 0), (1, 0))), axis=1)  # 0: the first token's document
    is_continued = state["xlcache"]["doc_ids"][:, -1] == doc_ids[:, 0]
    read_before = jnp.where(is_continued, state["pos_offset"], 0)[:, None]
    return split_blocks(t - start + jnp.where(start == 0, read_before, 0), block_len)


def positions_of(state: dict, doc_ids: jax.Array) -> jax.Array:
    """`doc_positions` for blocks that may be sharded over devices: int32 [R, B, L]."""

    def of_shard(pos_offset, before, doc_ids, axis):
        last = dict(pos_offset=pos_offset, xlcache=dict(doc_ids=before[:, None]))
        own_next = dict(pos_offset=pos_offset, xlcache=dict(doc_ids=doc_ids[-1, :, -1:]))
        last, _ = at_shard(last, own_next, dict(doc_ids=doc_ids), axis)
        return doc_positions(last, doc_ids)

    blocks = ("blocks", "batch", "token")
    mapped = placement().over_blocks(of_shard, (("batch",), ("batch",), blocks), blocks)
    return mapped(state["pos_offset"], state["xlcache"]["doc_ids"][:, -1], doc_ids)
