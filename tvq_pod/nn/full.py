"""Quadratic attention, `attn_type=full`: softmax over exact keys. What Transformer-VQ is measured against.

The same projections, gates, relative biases (up to M back) and document mask as attn.py; keys are not quantized, and a
query meets every key of its update and of the window before it. So the state is only the window, and what is older is
forgotten at the border of an update, as in Transformer-XL (arXiv 1901.02860).

To keep memory linear in T, queries are gone through in blocks whose scores are computed again in the backward pass; to
waste little on keys that come after a query, an update is cut into `PARTS`, each of which meets only what is before its
end: (PARTS + 1) / (2 PARTS) of the square is computed.
"""

import jax
import jax.numpy as jnp

from tvq_pod.nn.scores import NEVER, by_column
from tvq_pod.nn.types import TransformerConfig

PARTS = 8


def full_attention(q, recent: dict, biases: dict, config: TransformerConfig) -> jax.Array:
    """q: [B, H, T, K]. recent: k_hat [B, H, M + T, K] (exact keys), v [B, H, M + T, V], doc_ids [B, M + T]: the window
    and the update. biases: u, v [H, K] and r [H, M + 1, K]. Returns [B, H, T, V] in `dtype`; softmax is float32.
    """
    batch_size, n_head, update_len, _ = q.shape
    block_len, mem_len = config.block_len, config.mem_len
    n_blocks = update_len // block_len
    n_parts = max(n for n in range(1, PARTS + 1) if n_blocks % n == 0)
    part_len = update_len // n_parts
    outs = []
    for part in range(n_parts):
        begin, end = part * part_len, (part + 1) * part_len
        keys, values = recent["k_hat"][:, :, : mem_len + end], recent["v"][:, :, : mem_len + end]
        key_ids = recent["doc_ids"][:, : mem_len + end]

        @jax.checkpoint
        def attend(block_begin, block_q, block_ids, keys=keys, values=values, key_ids=key_ids):
            content = block_q + biases["u"][None, :, None, :]
            position = block_q + biases["v"][None, :, None, :]
            scores = jnp.einsum("bhlk,bhnk->bhln", content, keys, preferred_element_type=jnp.float32)
            by_distance = jnp.einsum("bhlk,hdk->bhld", position, biases["r"], preferred_element_type=jnp.float32)
            band = by_column(by_distance, mem_len)  # of columns block_begin .. block_begin + M + L
            near = jax.lax.dynamic_slice_in_dim(scores, block_begin, mem_len + block_len, axis=3)
            scores = jax.lax.dynamic_update_slice_in_dim(scores, near + band, block_begin, axis=3)
            places = mem_len + block_begin + jnp.arange(block_len)
            visible = jnp.arange(scores.shape[3])[None, :] <= places[:, None]
            visible = visible[None] & (block_ids[:, :, None] == key_ids[:, None, :])
            weights = jax.nn.softmax(jnp.where(visible[:, None], scores, NEVER), axis=-1)
            return jnp.einsum("bhln,bhnv->bhlv", weights.astype(config.dtype), values)

        def step(_, block, attend=attend):
            return None, attend(*block)

        starts = jnp.arange(begin, end, block_len)
        block_qs = q[:, :, begin:end].reshape(batch_size, n_head, len(starts), block_len, -1)
        block_ids = recent["doc_ids"][:, mem_len + begin : mem_len + end].reshape(batch_size, len(starts), block_len)
        blocks = (starts, jnp.moveaxis(block_qs, 2, 0), jnp.moveaxis(block_ids, 1, 0))
        _, out = jax.lax.scan(step, None, blocks)
        outs.append(jnp.moveaxis(out, 0, 2).reshape(batch_size, n_head, part_len, -1))
    return jnp.concatenate(outs, axis=2).astype(config.dtype)
