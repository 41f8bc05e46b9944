"""VQAttention: one gated attention unit with dense causal attention in linear time (arXiv 2309.16354).

Keys are quantized, so all keys that have left the window are described by a count and a mean value per code. For a
query q_i and the keys j <= i of its document, with d = i - j,

    score_ij = (q_i + u) . c_{z_j}  +  [d <= M] (q_i + v) . r_d
    out_i    = sum_j softmax_j(score_ij) v_j
             = ( sum_{window} e^{score_ij} v_j + sum_s n_s e^{(q_i + u) . c_s} mean_s ) / (the same without v and mean)

since a key farther than M contributes only through its code. So the answer does not depend on how tokens are cut into
blocks, only on M, the reach of the relative bias. With `agg_cache` off, attention itself ends at d = M.

Here are the unit's projections, the attention of one block, the state that goes from block to block, and the loop over
an update's blocks. The quantizer is in vq.py. Nothing here knows of a mesh.

Shapes: B rows, T tokens, R blocks of L, M window, S codes, H heads, K key width, V value width, D model width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tvq_pod.nn.full import full_attention
from tvq_pod.nn.layers import HeadProjection, rms_norm, sinusoids
from tvq_pod.nn.scores import NEVER, by_column
from tvq_pod.nn.types import TransformerConfig, VQSpec
from tvq_pod.nn.vq import VectorQuantizer

NO_DOC = -1  # document id of an empty window slot and of an empty cache


class VQAttention(nn.Module):
    """A gated attention unit (GAU, Hua et al., arXiv 2202.10447) over quantized keys.

    Parameters: norm, w_q, w_k, w_v, w_g, w_o, w_r, u, v and quantizer; all but the quantizer's have `param_dtype`.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.norm = rms_norm(c, use_scale=True)
        self.key_norm = rms_norm(c, use_scale=False)
        self.w_q = HeadProjection(c, c.d_k, "key")
        self.w_k = HeadProjection(c, c.d_k, "key")
        self.w_v = HeadProjection(c, c.d_v, "value")
        self.w_g = HeadProjection(c, c.d_v, "value")
        self.w_r = HeadProjection(c, c.d_k, "key")
        self.w_o = nn.DenseGeneral(
            features=c.d_model,
            axis=(-2, -1),
            use_bias=False,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            # the residual stream sums 2 n_layer units
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.variance_scaling(0.5 / c.n_layer, "fan_in", "normal"), ("heads", "value", "embed")
            ),
        )
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads", "key"))
        self.u = self.param("u", bias_init, (c.n_head, c.d_k), c.param_dtype)
        self.v = self.param("v", bias_init, (c.n_head, c.d_k), c.param_dtype)
        self.quantizer = VectorQuantizer(c) if c.attn_type == "vq" else None
        self.drop_sin = nn.Dropout(c.p_dropsin, rng_collection="timeless", deterministic=not c.is_train)
        self.drop_res = nn.Dropout(c.p_dropres, rng_collection="ephemeral", deterministic=not c.is_train)
        self.drop_layer = nn.Dropout(
            c.p_droplyr, broadcast_dims=(1, 2), rng_collection="timeless", deterministic=not c.is_train
        )

    # --- state -------------------------------------------------------------------------------------------------------

    @staticmethod
    def initial_state(config: TransformerConfig, batch_size: int) -> dict:
        """The state of `batch_size` streams that have read nothing.

        pos_offset [B] int32: tokens read of the document that the stream is in.
        xlcache: the window, oldest first: z [B, H, M] int32, k_hat [B, H, M, K] and v [B, H, M, V] in `dtype`,
          doc_ids [B, M] int32.
        aggcache: the cache: upper_div_lower [B, H, S, V] float32 (mean value per code; in bfloat16 a mean of more than
          256 values would stop moving), lower [B, H, S] float32 (count), latest_doc_id [B] int32.
        With attn_type full there is no z and no aggcache.
        """
        c, n_head = config, config.n_head
        state = dict(
            pos_offset=jnp.zeros([batch_size], jnp.int32),
            xlcache=dict(
                z=jnp.zeros([batch_size, n_head, c.mem_len], jnp.int32),
                k_hat=jnp.zeros([batch_size, n_head, c.mem_len, c.d_k], c.dtype),
                v=jnp.zeros([batch_size, n_head, c.mem_len, c.d_v], c.dtype),
                doc_ids=jnp.full([batch_size, c.mem_len], NO_DOC, jnp.int32),
            ),
            aggcache=dict(
                upper_div_lower=jnp.zeros([batch_size, n_head, c.n_code, c.d_v], jnp.float32),
                lower=jnp.zeros([batch_size, n_head, c.n_code], jnp.float32),
                latest_doc_id=jnp.full([batch_size], NO_DOC, jnp.int32),
            ),
        )
        return state if c.attn_type == "vq" else _without_cache(state)

    @staticmethod
    def state_axes(config: TransformerConfig) -> dict:
        """The logical name of every axis of `initial_state`, in the same tree."""
        axes = dict(
            pos_offset=("batch",),
            xlcache=dict(
                z=("batch", "heads", "window"),
                k_hat=("batch", "heads", "window", "key"),
                v=("batch", "heads", "window", "value"),
                doc_ids=("batch", "window"),
            ),
            aggcache=dict(
                upper_div_lower=("batch", "heads", "codes", "value"),
                lower=("batch", "heads", "codes"),
                latest_doc_id=("batch",),
            ),
        )
        return axes if config.attn_type == "vq" else _without_cache(axes)

    @staticmethod
    def get_agg_biases(counts: jax.Array) -> jax.Array:
        """log(counts), and a very negative number where a count is 0; exp() of the result is counts again."""
        return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1.0)), NEVER)

    # --- one block ---------------------------------------------------------------------------------------------------

    def attn(self, present_q, present_k, present_v, present_doc_ids, state: dict, vq_spec: VQSpec | None) -> dict:
        """Attention of one block: any length L, whatever `block_len` says. For attn_type vq.

        present_q, present_k: [B, H, L, K], normalised and scaled, keys not yet quantized. present_v: [B, H, L, V].
        present_doc_ids: int32 [B, L]. vq_spec: loss_mask [B, L], or None.
        Returns attn_out [B, L, H * V]; recent_z [B, H, M + L], recent_k_hat [B, H, M + L, K], recent_v
        [B, H, M + L, V], recent_doc_ids [B, M + L], which are the window followed by the block; and the quantizer's
        l_commit, l_codebook, metrics.
        """
        quantized = self.quantizer(present_k, vq_spec)
        recent = extend_window(
            state["xlcache"],
            dict(
                z=quantized["shortcodes"],
                k_hat=quantized["quantized"],
                v=present_v.astype(self.config.dtype),
                doc_ids=present_doc_ids,
            ),
        )
        out = block_attention(present_q, recent, state["aggcache"], self._biases(), self.config)  # [B, H, L, V]
        batch_size, _, block_len, _ = out.shape
        return dict(
            attn_out=jnp.swapaxes(out, 1, 2).reshape(batch_size, block_len, -1),
            **{f"recent_{name}": array for name, array in recent.items()},
            **{name: quantized[name] for name in ("l_commit", "l_codebook", "metrics")},
        )

    def update_state(self, recent_z, recent_k_hat, recent_v, recent_doc_ids, state: dict) -> dict:
        """The state after a block, from what `attn` returned for it and the state before it."""
        return next_state(dict(z=recent_z, k_hat=recent_k_hat, v=recent_v, doc_ids=recent_doc_ids), state)

    def _biases(self) -> dict:
        """What the scores are made of besides queries and keys: codes [H, S, K], u and v [H, K], r [H, M + 1, K]."""
        c = self.config
        table = self.drop_sin(sinusoids(jnp.arange(c.mem_len + 1), c.d_model))
        codes = dict(codes=self.quantizer.codes().astype(c.dtype)) if self.quantizer else {}
        return dict(
            **codes,
            u=self.u.astype(c.dtype),
            v=self.v.astype(c.dtype),
            r=self.w_r(table.astype(c.dtype)) * c.d_k**-0.25,
        )

    # --- an update ---------------------------------------------------------------------------------------------------

    def __call__(self, state: dict, input_dict: dict) -> tuple[dict, dict]:
        """The unit over T = R * L tokens.

        input_dict: input_features [B, T, D]; doc_ids int32 [B, T], never decreasing along T; vq_spec, or None.
        Returns (state after the T tokens, dict of res [B, T, D], l_commit, l_codebook, metrics).
        Raises ValueError if block_len does not divide T.
        """
        c = self.config
        x, doc_ids = input_dict["input_features"], input_dict["doc_ids"]
        batch_size, update_len, _ = x.shape
        if update_len % c.block_len:
            raise ValueError(f"block_len={c.block_len} does not divide the {update_len} tokens given")

        x = self.norm(x)
        scale = c.d_k**-0.25
        q = self.key_norm(self.w_q(x)) * scale
        k = self.key_norm(self.w_k(x)) * scale
        v = nn.silu(self.w_v(x))
        gate = nn.silu(self.w_g(x))

        if c.attn_type == "full":
            recent = extend_window(state["xlcache"], dict(k_hat=k, v=v, doc_ids=doc_ids))
            out = full_attention(q, recent, self._biases(), c)
            losses = dict(l_commit=jnp.zeros([]), l_codebook=jnp.zeros([]), metrics={})
            return next_state(recent, state), dict(res=self._residual(out, gate), **losses)

        quantized = self.quantizer(k, input_dict["vq_spec"])
        present = dict(z=quantized["shortcodes"], k_hat=quantized["quantized"], v=v, doc_ids=doc_ids)
        biases = self._biases()

        def one_block(state, block):
            if not c.grad_thru_cache:
                state = jax.lax.stop_gradient(state)
            recent = extend_window(state["xlcache"], block["present"])
            out = block_attention(block["q"], recent, state["aggcache"], biases, c)
            return next_state(recent, state), out

        n_blocks = update_len // c.block_len
        if n_blocks == 1:
            state, out = one_block(state, dict(q=q, present=present))
        else:
            state, out = jax.lax.scan(one_block, state, split_blocks(dict(q=q, present=present), n_blocks))
            out = jnp.moveaxis(out, 0, 2).reshape(batch_size, c.n_head, update_len, c.d_v)

        return state, dict(
            res=self._residual(out, gate), **{name: quantized[name] for name in ("l_commit", "l_codebook", "metrics")}
        )

    def _residual(self, out, gate) -> jax.Array:
        """[B, H, T, V] and its gate -> [B, T, D]."""
        return self.drop_layer(self.drop_res(self.w_o(jnp.swapaxes(out * gate, 1, 2))))


# --- the pieces, as functions of arrays ------------------------------------------------------------------------------


def _without_cache(state: dict) -> dict:
    window = {name: leaf for name, leaf in state["xlcache"].items() if name != "z"}
    return dict(pos_offset=state["pos_offset"], xlcache=window)


def _time_axis(name: str) -> int:
    return {"z": 2, "k_hat": 2, "v": 2, "q": 2, "doc_ids": 1}[name]


def extend_window(xlcache: dict, present: dict) -> dict:
    """The window followed by the block: z, k_hat, v and doc_ids, each M + L long."""
    return {name: jnp.concatenate([xlcache[name], present[name]], axis=_time_axis(name)) for name in xlcache}


def split_blocks(arrays: dict, n_blocks: int) -> dict:
    """Cuts the T axis of q, z, k_hat, v and doc_ids into R blocks, and puts R first."""

    def split(path, array):
        axis = _time_axis(path[-1].key)
        shape = (*array.shape[:axis], n_blocks, array.shape[axis] // n_blocks, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    return jax.tree_util.tree_map_with_path(split, arrays)


def block_attention(q, recent: dict, aggcache: dict, biases: dict, config: TransformerConfig) -> jax.Array:
    """Attention of one block's queries over its window and its cache; the equation is at the head of this file.

    q: [B, H, L, K]. recent: see `extend_window`. aggcache: see `VQAttention.initial_state`. biases: see `_biases`.
    Returns [B, H, L, V] in `dtype`; scores and softmax are float32.
    """
    block_len, mem_len = q.shape[2], config.mem_len
    content_q = q + biases["u"][None, :, None, :]
    position_q = q + biases["v"][None, :, None, :]

    scores = jnp.einsum("bhlk,bhmk->bhlm", content_q, recent["k_hat"], preferred_element_type=jnp.float32)
    by_distance = jnp.einsum("bhlk,hdk->bhld", position_q, biases["r"], preferred_element_type=jnp.float32)
    scores += by_column(by_distance, mem_len)
    present_doc_ids = recent["doc_ids"][:, mem_len:]
    visible = window_mask(block_len, mem_len, local=not config.agg_cache)
    visible = visible[None] & (present_doc_ids[:, :, None] == recent["doc_ids"][:, None, :])  # [B, L, M + L]
    scores = jnp.where(visible[:, None], scores, NEVER)
    top = jnp.max(scores, axis=-1, keepdims=True)

    if config.agg_cache:
        cache_scores = jnp.einsum("bhlk,hsk->bhls", content_q, biases["codes"], preferred_element_type=jnp.float32)
        cache_scores += VQAttention.get_agg_biases(aggcache["lower"])[:, :, None, :]
        same_doc = present_doc_ids == aggcache["latest_doc_id"][:, None]  # [B, L]
        cache_scores = jnp.where(same_doc[:, None, :, None], cache_scores, NEVER)
        top = jnp.maximum(top, jnp.max(cache_scores, axis=-1, keepdims=True))

    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bhlm,bhmv->bhlv", weights.astype(config.dtype), recent["v"], preferred_element_type=jnp.float32)
    if config.agg_cache:
        weights = jnp.exp(cache_scores - top)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        out += jnp.einsum(
            "bhls,bhsv->bhlv",
            weights.astype(config.dtype),
            aggcache["upper_div_lower"].astype(config.dtype),
            preferred_element_type=jnp.float32,
        )
    return (out / total).astype(config.dtype)


def window_mask(block_len: int, mem_len: int, local: bool) -> jax.Array:
    """[L, M + L] bool: query a of the block may look at column j of the window and block: a key at or before it, and,
    if `local`, at most M before it."""
    distance = mem_len + jnp.arange(block_len)[:, None] - jnp.arange(mem_len + block_len)[None, :]
    visible = distance >= 0
    return visible & (distance <= mem_len) if local else visible


def next_state(recent: dict, state: dict) -> dict:
    """The state after a block: its last M keys are the window, what came before them goes into the cache.

    The rule for documents: the cache keeps tokens of one document only, that of the last token to leave the window.
    """
    mem_len = state["xlcache"]["doc_ids"].shape[1]
    block_len = recent["doc_ids"].shape[1] - mem_len
    doc_ids = recent["doc_ids"]

    last_before, last = doc_ids[:, mem_len - 1], doc_ids[:, -1]
    n_present = jnp.sum(doc_ids[:, mem_len:] == last[:, None], axis=1, dtype=jnp.int32)
    pos_offset = n_present + jnp.where(last_before == last, state["pos_offset"], 0)

    window = {name: jax.lax.slice_in_dim(recent[name], block_len, None, axis=_time_axis(name)) for name in recent}
    if "aggcache" not in state:
        return dict(pos_offset=pos_offset, xlcache=window)
    leaving = {name: jax.lax.slice_in_dim(recent[name], 0, block_len, axis=_time_axis(name)) for name in recent}
    return dict(
        pos_offset=pos_offset,
        xlcache=window,
        aggcache=absorb(state["aggcache"], leaving),
    )


def absorb(aggcache: dict, leaving: dict) -> dict:
    """Adds the keys that leave the window (z [B, H, n], v [B, H, n, V], doc_ids [B, n]) to the cache."""
    lower, mean = aggcache["lower"], aggcache["upper_div_lower"]
    doc_id = leaving["doc_ids"][:, -1]
    counted = (leaving["doc_ids"] == doc_id[:, None]) & (doc_id[:, None] != NO_DOC)  # [B, n]
    onehot = jax.nn.one_hot(leaving["z"], lower.shape[-1], dtype=jnp.float32) * counted[:, None, :, None]
    n = jnp.sum(onehot, axis=2)  # [B, H, S]
    value_sums = jnp.einsum(
        "bhns,bhnv->bhsv",
        onehot.astype(leaving["v"].dtype),
        leaving["v"],
        preferred_element_type=jnp.float32,
    )
    keep = (aggcache["latest_doc_id"] == doc_id)[:, None, None]
    old_lower = jnp.where(keep, lower, 0.0)
    old_mean = jnp.where(keep[..., None], mean, 0.0)
    new_lower = old_lower + n
    new_mean = old_mean + (value_sums - n[..., None] * old_mean) / jnp.maximum(new_lower, 1.0)[..., None]
    return dict(upper_div_lower=new_mean, lower=new_lower, latest_doc_id=doc_id)
