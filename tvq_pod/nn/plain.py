"""The attention core in its simplest form, `attention="plain"`: one block after another, one softmax per query.

Every JAX transformation works on it: jacfwd, jacrev, vmap, jit. It has no hand-written gradient and shares no code with
attend.py, cache.py and scores.py beyond the constants for an empty slot, so it is the oracle that the fast
implementations are tested against. It is slow: a scan over blocks that keeps all scores of a block for the backward
pass. The equations are at the head of attn.py.

Shapes: R blocks of L, B rows, H key heads, G query heads for each, M window, S codes, K, V.
"""

import functools

import jax
import jax.numpy as jnp

from tvq_pod.nn.cache import NO_DOC
from tvq_pod.nn.scores import NEVER
from tvq_pod.nn.types import TransformerConfig


def plain_attention(config: TransformerConfig, biases: dict, q, present: dict, state: dict) -> tuple[jax.Array, dict]:
    """Computes attention for R blocks in order, each from the state after the previous one.

    q: [R, B, H, G, L, K]. present: z [R, B, H, L], k_hat [R, B, H, L, K], v [R, B, H, L, V], doc_ids [R, B, L]. biases:
    u and v [H, G, K], r [H, M + 1, K], codes [H, S, K]. state: as `VQAttention.initial_state` returns it.
    Returns [R, B, H, G, L, V] in the dtype of q, and the state after the last block.
    """

    def one_block(state, block):
        q, present = block
        if not config.grad_thru_cache:
            state = jax.lax.stop_gradient(state)
        recent = {name: _appended(state["xlcache"][name], present[name]) for name in present}
        return _next_state(config, recent, state), _attend(config, biases, q, recent, state["aggcache"])

    if len(q) == 1:  # a single recurrent step compiles faster without a loop
        state, out = one_block(state, jax.tree.map(lambda x: x[0], (q, present)))
        return out[None], state
    state, out = jax.lax.scan(one_block, state, (q, present))
    return out, state


def _appended(window, block):
    """The window followed by the block. The token axis is axis 1 of doc_ids [B, M], axis 2 of all others."""
    return jnp.concatenate([window, block], axis=min(2, window.ndim - 1))


def _attend(config: TransformerConfig, biases: dict, q, recent: dict, cache: dict):
    """Attention of q [B, H, G, L, K] over recent: k_hat [B, H, M + L, K], v, doc_ids [B, M + L]; and over the cache."""
    mem_len, block_len = config.mem_len, q.shape[-2]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    q_content, q_position = (q + biases[name][None, :, :, None] for name in ("u", "v"))

    row = jax.lax.broadcasted_iota(jnp.int32, (block_len, mem_len + block_len), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (block_len, mem_len + block_len), 1)
    distance = mem_len + row - column  # [L, M + L]
    by_distance = dot("bhglk,hdk->bhgld", q_position, biases["r"]) + config.window_bias
    at = jnp.broadcast_to(jnp.clip(distance, 0, mem_len), (*q.shape[:-1], mem_len + block_len))
    relative = jnp.take_along_axis(by_distance, at, axis=-1)
    is_near = jnp.expand_dims(distance <= mem_len, (0, 1, 2))
    scores = dot("bhglk,bhmk->bhglm", q_content, recent["k_hat"]) + jnp.where(is_near, relative, 0.0)

    doc_ids = recent["doc_ids"][:, mem_len:]
    is_seen = (doc_ids[:, :, None] == recent["doc_ids"][:, None, :]) & (distance >= 0)[None]  # [B, L, M + L]
    if not config.agg_cache:
        is_seen &= (distance <= mem_len)[None]
    scores = jnp.where(is_seen[:, None, None], scores, NEVER)
    values = recent["v"]

    if config.agg_cache:
        is_empty = cache["lower"] == 0
        log_counts = jnp.where(is_empty, NEVER, jnp.log(jnp.where(is_empty, 1.0, cache["lower"])))
        of_codes = dot("bhglk,hsk->bhgls", q_content, biases["codes"]) + log_counts[:, :, None, None, :]
        is_cached = (doc_ids == cache["latest_doc_id"][:, None])[:, None, None, :, None]
        scores = jnp.concatenate([scores, jnp.where(is_cached, of_codes, NEVER)], axis=-1)
        values = jnp.concatenate([values, cache["upper_div_lower"].astype(values.dtype)], axis=-2)

    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhglm,bhmv->bhglv", weights, values)


def _next_state(config: TransformerConfig, recent: dict, state: dict) -> dict:
    """The state after the block, by the rule for documents."""
    mem_len, cache = config.mem_len, state["aggcache"]
    block_len = recent["doc_ids"].shape[1] - mem_len

    leaving_ids = recent["doc_ids"][:, :block_len]
    latest = leaving_ids[:, -1]
    is_kept = (cache["latest_doc_id"] == latest)[:, None, None]  # [B, 1, 1]
    is_counted = (leaving_ids == latest[:, None]) & (leaving_ids != NO_DOC)
    chosen = recent["z"][:, :, :block_len, None] == jnp.arange(config.n_code, dtype=jnp.int32).reshape(1, 1, 1, -1)
    chosen = (chosen & is_counted[:, None, :, None]).astype(cache["lower"].dtype)  # [B, H, L, S]
    leaving_v = recent["v"][:, :, :block_len].astype(chosen.dtype)
    lower_before = jnp.where(is_kept, cache["lower"], 0.0)
    lower = lower_before + jnp.sum(chosen, axis=2)
    upper = lower_before[..., None] * cache["upper_div_lower"]
    upper += jnp.einsum("bhls,bhlv->bhsv", chosen, leaving_v, precision="highest")

    before, now = state["xlcache"]["doc_ids"][:, -1], recent["doc_ids"][:, -1]
    n_of_document = jnp.sum(recent["doc_ids"][:, mem_len:] == now[:, None], axis=1, dtype=jnp.int32)
    return dict(
        pos_offset=n_of_document + jnp.where(before == now, state["pos_offset"], 0),
        xlcache={name: jax.lax.slice_in_dim(x, block_len, None, axis=min(2, x.ndim - 1)) for name, x in recent.items()},
        aggcache=dict(upper_div_lower=upper / jnp.maximum(lower, 1.0)[..., None], lower=lower, latest_doc_id=latest),
    )
