"""Quadratic attention, `attn_type=full`: softmax over exact keys, the baseline for Transformer-VQ.

It has the same projections, gates, relative biases (up to M back) and document mask as attn.py, but keys are not
quantized, and a query attends to every key of its update and of the window before it. So the state is only the window,
and older tokens are forgotten at the end of an update, as in Transformer-XL (arXiv 1901.02860).

To keep memory linear in T, queries are processed in blocks whose scores are recomputed in the backward pass; to waste
little on keys that come after a query, an update is cut into `PARTS`, each of which attends only to keys before its
end: about (PARTS + 1) / (2 PARTS) of the square is computed.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.scores import NEVER, as_last_axes, relative_bias
from tvq_pod.nn.types import TransformerConfig

PARTS = 8


def full_attention(q, position_q, r, recent: dict, config: TransformerConfig) -> jax.Array:
    """Computes attention. q: [R, B, H, G, L, K], queries of R blocks of L. position_q [R, B, H, G, L, K] and
    r [H, M + 1, K]: the operands of `relative_bias`. recent: k_hat [B, H, M + R L, K] (exact keys),
    v [B, H, M + R L, V], doc_ids [B, M + R L]: the window and the blocks. config: mem_len and window_bias are used.
    Returns [R, B, H, G, L, V] in the dtype of q; softmax is float32.
    """
    n_blocks, *_, block_len, _ = q.shape
    mem_len = config.mem_len
    n_parts = min(PARTS, n_blocks)
    borders = [part * n_blocks // n_parts for part in range(n_parts + 1)]
    outs = []
    for begin, end in itertools.pairwise(borders):
        length = mem_len + end * block_len
        keys, values, ids = recent["k_hat"][:, :, :length], recent["v"][:, :, :length], recent["doc_ids"][:, :length]

        @jax.checkpoint
        def attend(place, q, position_q, keys=keys, values=values, ids=ids):
            scores = jnp.einsum("bhglk,bhnk->bhgln", q, keys, preferred_element_type=jnp.float32)
            bias = relative_bias(position_q, r, config.window_bias)
            in_reach = jnp.concatenate([bias.past(mem_len), bias.present()], axis=-1)  # columns place .. place + M + L
            in_reach += jax.lax.dynamic_slice_in_dim(scores, place, mem_len + block_len, axis=4)
            scores = jax.lax.dynamic_update_slice_in_dim(scores, in_reach, place, axis=4)
            places = mem_len + place + jnp.arange(block_len)
            own_ids = jax.lax.dynamic_slice_in_dim(ids, mem_len + place, block_len, axis=1)
            visible = as_last_axes(jnp.arange(ids.shape[1])[None, :] <= places[:, None], scores)
            visible &= (own_ids[:, :, None] == ids[:, None, :])[:, None, None]
            weights = jax.nn.softmax(jnp.where(visible, scores, NEVER), axis=-1)
            return jnp.einsum("bhgln,bhnv->bhglv", weights.astype(q.dtype), values)

        places = jnp.arange(begin, end) * block_len
        blocks = (places, q[begin:end], position_q[begin:end])
        _, out = jax.lax.scan(lambda _, block, attend=attend: (None, attend(*block)), None, blocks)
        outs.append(out)
    return checkpoint_name(jnp.concatenate(outs), "attended")
