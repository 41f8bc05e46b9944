"""VQAttention: one gated attention unit with dense causal attention in linear time (arXiv 2309.16354).

Keys are quantized, so all keys that have left the window are described by a count and a mean value per code. For a
query q_i and the keys j <= i of its document, with d = i - j,

    score_ij = (q_i + u) . c_{z_j}  +  [d <= M] ((q_i + v) . r_d + window_bias)
    out_i    = sum_j softmax_j(score_ij) v_j
             = ( sum_{window} e^{score_ij} v_j + sum_s n_s e^{(q_i + u) . c_s} mean_s ) / (the same without v and mean)

since a key farther than M contributes only through its code. So the answer does not depend on how tokens are cut into
blocks, only on M, the reach of the relative bias. With `agg_cache` off, attention itself ends at d = M. In the paper
`window_bias` is 0.

Here are the unit's projections and the state that goes from update to update. All blocks of an update are attended to
at once: attend.py has the softmax, cache.py the caches of all blocks, scores.py the relative biases, vq.py the
quantizer. Nothing here knows of a mesh.

Shapes: B rows, T tokens, R blocks of L, M window, S codes, Q query heads, H key heads, K key width, V value width,
D model width. Q = H, but for head_type mqa, where H = 1. Blocks come first: [R, B, ...]; so the keys and values before
a block are the same array, one place further on, and cost no copy.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.attend import Places, Sources, attend
from tvq_pod.nn.axes import constrain, placement
from tvq_pod.nn.cache import NO_DOC, caches, initial_cache
from tvq_pod.nn.full import full_attention
from tvq_pod.nn.layers import Dropout, HeadProjection, OutputProjection, RMSNorm, sinusoids
from tvq_pod.nn.plain import plain_attention
from tvq_pod.nn.scores import NEVER, relative_bias
from tvq_pod.nn.sequence import at_shard
from tvq_pod.nn.types import TransformerConfig, VQSpec
from tvq_pod.nn.vq import VectorQuantizer


class VQAttention(nn.Module):
    """Attention over quantized keys. With head_type shga it is a gated attention unit (GAU, Hua et al., arXiv
    2202.10447); with mqa and mha there is no gate, and an MLP follows (mlp.py).

    The contract. `initial_state`, `apply` with `state` and `input_dict`, `method=VQAttention.attn`,
    `method=VQAttention.update_state` and `get_agg_biases` have the names, arguments and results that the tests of the
    paper's own implementation use (github.com/transformer-vq/transformer_vq, tests/nn/test_attn.py), so that module
    runs against this class. It requires four properties: outputs are causal; they do not depend on how tokens are cut
    into blocks; neither do gradients by queries; and documents do not see each other. tests/nn/test_contract.py makes
    the same calls. With `config.attention="plain"` any transformation goes through the module, forward-mode
    differentiation included; "xla" has a hand-written gradient and is reverse-mode only.

    Parameters: norm, w_q, w_k, w_v, w_g (shga), w_o, w_r, u, v and quantizer; all but the quantizer's have
    `param_dtype`.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.norm = RMSNorm(c, use_scale=True)
        self.key_norm = RMSNorm(c, use_scale=False)
        _, value = c.value_names
        self.w_q = HeadProjection(c, c.n_head, c.d_k, ("heads", "key"))
        self.w_k = HeadProjection(c, c.n_key_head, c.d_k, ("key_heads", "key"))
        self.w_v = HeadProjection(c, c.n_key_head, c.d_v, c.value_names)
        self.w_g = HeadProjection(c, c.n_head, c.d_v, ("heads", value)) if c.head_type == "shga" else None
        self.w_r = HeadProjection(c, c.n_key_head, c.d_k, ("key_heads", "key"))
        self.w_o = OutputProjection(c, ("heads", value))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads", "key"))
        self.u = self.param("u", bias_init, (c.n_head, c.d_k), c.param_dtype)
        self.v = self.param("v", bias_init, (c.n_head, c.d_k), c.param_dtype)
        self.quantizer = VectorQuantizer(c) if c.attn_type == "vq" else None
        self.drop_sin = Dropout(c.p_dropsin, "timeless", c.is_train)

    # --- state -------------------------------------------------------------------------------------------------------

    @staticmethod
    def initial_state(config: TransformerConfig, batch_size: int) -> dict:
        """The state of `batch_size` streams that have read nothing.

        pos_offset [B] int32: tokens read of the document that the stream is in.
        xlcache: the window, oldest first: z [B, H, M] int32, k_hat [B, H, M, K] and v [B, H, M, V] in `dtype`,
          doc_ids [B, M] int32.
        aggcache: the cache, see `initial_cache`.
        With attn_type full there is no z and no aggcache.
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
        return state if c.attn_type == "vq" else _without_cache(state)

    @staticmethod
    def state_axes(config: TransformerConfig) -> dict:
        """The logical name of every axis of `initial_state`, in the same tree."""
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

    @staticmethod
    def get_agg_biases(counts: jax.Array) -> jax.Array:
        """log(counts), and a very negative number where a count is 0; exp() of the result is counts again."""
        return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1.0)), NEVER)

    # --- one block ---------------------------------------------------------------------------------------------------

    def attn(self, present_q, present_k, present_v, present_doc_ids, state: dict, vq_spec: VQSpec | None) -> dict:
        """Attention of one block: any length L, whatever `block_len` says. For attn_type vq.

        present_q: [B, Q, L, K] and present_k: [B, H, L, K], normalised and scaled, keys not yet quantized. present_v:
        [B, H, L, V]. present_doc_ids: int32 [B, L]. vq_spec: loss_mask [B, L], or None.
        Returns attn_out [B, L, Q * V]; recent_z [B, H, M + L], recent_k_hat [B, H, M + L, K], recent_v
        [B, H, M + L, V], recent_doc_ids [B, M + L], which are the window followed by the block; and the quantizer's
        l_commit, l_codebook, metrics.
        """
        present_q, present_k, present_v = (x.astype(self.config.dtype) for x in (present_q, present_k, present_v))
        quantized = self.quantizer(present_k[None], None if vq_spec is None else VQSpec(vq_spec.loss_mask[None]))
        present = dict(
            z=quantized["shortcodes"],
            k_hat=quantized["quantized"],
            v=present_v[None],
            doc_ids=present_doc_ids[None],
        )
        out, _ = self._attend(present_q[None], present, state)
        batch_size, _, block_len, _ = out.shape[1:]
        return dict(
            attn_out=jnp.swapaxes(out[0], 1, 2).reshape(batch_size, block_len, -1),
            **{f"recent_{name}": array for name, array in extend_window(state["xlcache"], present).items()},
            **{name: quantized[name] for name in ("l_commit", "l_codebook", "metrics")},
        )

    def update_state(self, recent_z, recent_k_hat, recent_v, recent_doc_ids, state: dict) -> dict:
        """The state after a block, from what `attn` returned for it and the state before it."""
        recent = dict(z=recent_z, k_hat=recent_k_hat, v=recent_v, doc_ids=recent_doc_ids)
        mem_len = self.config.mem_len
        present = {n: jax.lax.slice_in_dim(x, mem_len, None, axis=TOKEN_AXIS[n])[None] for n, x in recent.items()}
        _, aggcache = caches(state["aggcache"], leaving_chunks(state["xlcache"], present), self.config.reduction)
        return next_state(present, state) | dict(aggcache=aggcache)

    # --- an update ---------------------------------------------------------------------------------------------------

    def __call__(self, state: dict, input_dict: dict) -> tuple[dict, dict]:
        """The unit over T = R * L tokens.

        input_dict: input_features [B, T, D]; doc_ids int32 [B, T], never decreasing along T; vq_spec, or None.
        Returns (state after the T tokens, dict of res [B, T, D], l_commit, l_codebook, metrics).
        Raises ValueError if block_len does not divide T.
        """
        c = self.config
        x, doc_ids, vq_spec = (input_dict[name] for name in ("input_features", "doc_ids", "vq_spec"))
        update_len = x.shape[1]
        if update_len % c.block_len:
            raise ValueError(f"block_len={c.block_len} does not divide the {update_len} tokens given")
        vq_spec = vq_spec and vq_spec.replace(loss_mask=split_blocks(vq_spec.loss_mask, c.block_len))
        state, out = self.blocks(state, split_blocks(x, c.block_len), split_blocks(doc_ids, c.block_len), vq_spec)
        return state, out | dict(res=join_blocks(out["res"]))

    def blocks(self, state: dict, x, doc_ids, vq_spec: VQSpec | None) -> tuple[dict, dict]:
        """The unit over R blocks: x [R, B, L, D], doc_ids and loss_mask [R, B, L]. Returns what `__call__` does, with
        res [R, B, L, D]."""
        c = self.config
        x = self.norm(x)
        scale = c.d_k**-0.25
        q = self.key_norm(checkpoint_name(self.w_q(x), "projected")) * scale
        k = self.key_norm(checkpoint_name(self.w_k(x), "projected")) * scale
        v = checkpoint_name(self.w_v(x), "projected")
        if c.head_type == "shga":
            v, gate = nn.silu(v), nn.silu(checkpoint_name(self.w_g(x), "projected"))
        if c.attn_type == "full":
            present = dict(k_hat=k, v=v, doc_ids=doc_ids)
            biases, recent = self._biases(), extend_window(state["xlcache"], present)
            grouped = self._grouped(q)
            position_q = grouped + _per_query_head(biases["v"], c)
            grouped += _per_query_head(biases["u"], c)
            out = full_attention(grouped, position_q, biases["r"], recent, c).reshape(*q.shape[:-1], c.d_v)
            losses = dict(l_commit=jnp.zeros([]), l_codebook=jnp.zeros([]), metrics={})
            new_state = next_state(present, state)
        else:
            quantized = self.quantizer(k, vq_spec)
            losses = {name: quantized[name] for name in ("l_commit", "l_codebook", "metrics")}
            present = dict(z=quantized["shortcodes"], k_hat=quantized["quantized"], v=v, doc_ids=doc_ids)
            out, new_state = self._attend(q, present, state)
        out = out * gate if c.head_type == "shga" else out
        return new_state, dict(res=self.w_o(out), **losses)

    def _attend(self, q, present: dict, state: dict) -> tuple[jax.Array, dict]:
        """Attention of R blocks: q [R, B, Q, L, K]; present: z, k_hat, v, doc_ids of the blocks. Returns
        [R, B, Q, L, V], and the state after the last of them."""
        c = self.config
        shape = (*q.shape[:-1], c.d_v)
        if c.attention == "plain":
            biases = self._biases()
            biases |= {name: biases[name].reshape(c.n_key_head, -1, c.d_k) for name in ("u", "v")}
            out, new_state = plain_attention(c, biases, self._grouped(q), present, state)
            return out.reshape(shape), new_state
        past, before, positions, new_state = surroundings(c, present, state)
        if not c.grad_thru_cache:
            past, before = jax.lax.stop_gradient((past, before))
        biases, of_cache = self._biases(), c.agg_cache
        q = self._grouped(q)
        out = attend(
            c.mem_len,
            q + _per_query_head(biases["u"], c),
            relative_bias(q + _per_query_head(biases["v"], c), biases["r"], c.window_bias),
            Sources(past["k_hat"], present["k_hat"], biases["codes"] if of_cache else None),
            Sources(past["v"], present["v"], before["upper_div_lower"] if of_cache else None),
            Places(
                positions,
                present["doc_ids"] == before["latest_doc_id"][..., None] if of_cache else None,
                self.get_agg_biases(before["lower"]) if of_cache else None,
            ),
        )
        return out.reshape(shape), new_state

    def _grouped(self, q: jax.Array) -> jax.Array:
        """[R, B, Q, L, K] -> [R, B, H, G, L, K]: query heads by their key head."""
        return q.reshape(*q.shape[:2], self.config.n_key_head, -1, *q.shape[3:])

    def _biases(self) -> dict:
        """What scores are made of besides queries and keys: codes [H, S, K], u and v [Q, K], r [H, M + 1, K]."""
        c = self.config
        table = constrain(self.drop_sin(sinusoids(jnp.arange(c.mem_len + 1), c.d_model)), None, None)
        codes = dict(codes=self.quantizer.codes().astype(c.dtype)) if self.quantizer else {}
        return dict(
            **codes,
            u=self.u.astype(c.dtype),
            v=self.v.astype(c.dtype),
            r=self.w_r(table.astype(c.dtype)) * c.d_k**-0.25,
        )


# --- the pieces, as functions of arrays ------------------------------------------------------------------------------


def _without_cache(state: dict) -> dict:
    window = {name: leaf for name, leaf in state["xlcache"].items() if name != "z"}
    return dict(pos_offset=state["pos_offset"], xlcache=window)


def _per_query_head(bias: jax.Array, config: TransformerConfig) -> jax.Array:
    """[Q, K] -> [1, 1, H, G, 1, K]."""
    return bias.reshape(1, 1, config.n_key_head, -1, 1, config.d_k)


def surroundings(config: TransformerConfig, present: dict, state: dict) -> tuple[dict, dict, jax.Array, dict]:
    """What blocks must know of what is before them, and the state after them.

    Returns `window_of_blocks`, the `caches` that blocks meet, `doc_positions`, and the next state.
    """

    def of_shard(present, state, axis):
        state, new_state = at_shard(state, next_state(present, state), present, axis)
        before, after = caches(state["aggcache"], leaving_chunks(state["xlcache"], present), config.reduction, axis)
        positions = doc_positions(state, present["doc_ids"])
        return window_of_blocks(state["xlcache"], present), before, positions, new_state | dict(aggcache=after)

    heads, value = config.value_names
    blocks, axes = ("blocks", "batch"), VQAttention.state_axes(config)
    codes, values = (*blocks, heads, "token"), (*blocks, heads, "token", value)
    in_axes = dict(z=codes, k_hat=(*codes, "key"), v=values, doc_ids=(*blocks, "token")), axes
    past = dict(k_hat=(*codes, "key"), v=values)
    before = dict(
        upper_div_lower=(*blocks, heads, "codes", value), lower=(*blocks, heads, "codes"), latest_doc_id=blocks
    )
    return placement().over_blocks(of_shard, in_axes, (past, before, (*blocks, "token"), axes))(present, state)


def positions_of(state: dict, doc_ids: jax.Array) -> jax.Array:
    """`doc_positions`, of blocks that may be spread over devices: int32 [R, B, L]."""

    def of_shard(pos_offset, before, doc_ids, axis):
        last = dict(pos_offset=pos_offset, xlcache=dict(doc_ids=before[:, None]))
        own_next = dict(pos_offset=pos_offset, xlcache=dict(doc_ids=doc_ids[-1, :, -1:]))
        last, _ = at_shard(last, own_next, dict(doc_ids=doc_ids), axis)
        return doc_positions(last, doc_ids)

    blocks = ("blocks", "batch", "token")
    mapped = placement().over_blocks(of_shard, (("batch",), ("batch",), blocks), blocks)
    return mapped(state["pos_offset"], state["xlcache"]["doc_ids"][:, -1], doc_ids)


TOKEN_AXIS = dict(z=2, k_hat=2, v=2, doc_ids=1)  # of the window; of blocks, one more


def split_blocks(x: jax.Array, block_len: int) -> jax.Array:
    """[B, T, ...] -> [R, B, L, ...]."""
    return jnp.swapaxes(x.reshape(len(x), -1, block_len, *x.shape[2:]), 0, 1)


def join_blocks(x: jax.Array) -> jax.Array:
    """[R, B, L, ...] -> [B, T, ...]."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def extend_window(xlcache: dict, present: dict) -> dict:
    """The window followed by the blocks, as one stretch of M + T tokens: [B, H, M + T, ...], doc_ids [B, M + T]."""

    def extended(name, window):
        axis = TOKEN_AXIS[name]
        blocks = jnp.moveaxis(present[name], 0, axis)  # [B, H, R, L, ...]
        blocks = blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
        return jnp.concatenate([window, blocks], axis=axis)

    return {name: extended(name, window) for name, window in xlcache.items()}


def _window_then_blocks(name: str, xlcache: dict, present: dict) -> jax.Array:
    """The window as whole blocks, oldest first, and the blocks: [P / L + R, B, H, L, ...]; zeros stand before the
    window's first token.

    What is needed of it is always sliced from this whole: XLA makes no copy of that, as it does of a concatenation of
    slices.
    """
    axis, window, blocks = TOKEN_AXIS[name], xlcache[name], present[name]
    block_len = blocks.shape[axis + 1]
    window = jnp.pad(window, [(-window.shape[axis] % block_len if n == axis else 0, 0) for n in range(window.ndim)])
    before = jnp.moveaxis(window.reshape(*window.shape[:axis], -1, block_len, *window.shape[axis + 1 :]), axis, 0)
    return jnp.concatenate([before, blocks])


def window_of_blocks(xlcache: dict, present: dict) -> dict:
    """The window of each block: k_hat and v [R, B, H, P, ...]. P is M; for several blocks, M rounded up to whole
    blocks, and the last M columns are the window."""
    n_blocks = len(present["doc_ids"])

    def past(name):
        if n_blocks == 1:
            return xlcache[name][None]
        whole = _window_then_blocks(name, xlcache, present)
        pieces = [whole[n : n + n_blocks] for n in range(len(whole) - n_blocks)]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=TOKEN_AXIS[name] + 1)

    return {name: past(name) for name in ("k_hat", "v")}


def leaving_chunks(xlcache: dict, present: dict) -> dict:
    """The tokens that leave the window after each block: z and v [R, B, H, L, ...], doc_ids [R, B, L]."""
    n_blocks, _, block_len = present["doc_ids"].shape
    mem_len = xlcache["doc_ids"].shape[1]

    def leaving(name):
        axis = TOKEN_AXIS[name]
        if n_blocks == 1:
            recent = jnp.concatenate([xlcache[name], present[name][0]], axis=axis)
            return jax.lax.slice_in_dim(recent, 0, block_len, axis=axis)[None]
        whole = _window_then_blocks(name, xlcache, present)
        rest = -mem_len % block_len  # zeros in front: a chunk begins so many places into a block
        if not rest:
            return whole[:n_blocks]
        parts = [
            jax.lax.slice_in_dim(whole[:n_blocks], rest, None, axis=axis + 1),
            jax.lax.slice_in_dim(whole[1 : n_blocks + 1], 0, rest, axis=axis + 1),
        ]
        return jnp.concatenate(parts, axis=axis + 1)

    return {name: leaving(name) for name in ("z", "v", "doc_ids")}


def doc_positions(state: dict, doc_ids: jax.Array) -> jax.Array:
    """Position of each token in its document, int32 [R, B, L]. doc_ids: [R, B, L], after what `state` has read."""
    block_len = doc_ids.shape[2]
    doc_ids = join_blocks(doc_ids)
    before = jnp.concatenate([state["xlcache"]["doc_ids"][:, -1:], doc_ids[:, :-1]], axis=1)
    t = jnp.broadcast_to(jnp.arange(doc_ids.shape[1], dtype=jnp.int32), doc_ids.shape)
    latest_start = jax.lax.cummax(jnp.where(doc_ids != before, t, -1), axis=1)
    return split_blocks(jnp.where(latest_start < 0, state["pos_offset"][:, None] + t, t - latest_start), block_len)


def next_state(present: dict, state: dict) -> dict:
    """pos_offset and xlcache after the blocks: the last M keys are the window."""
    xlcache, doc_ids = state["xlcache"], present["doc_ids"]
    n_blocks, mem_len = len(doc_ids), xlcache["doc_ids"].shape[1]
    last_before, last = xlcache["doc_ids"][:, -1], doc_ids[-1, :, -1]
    n_present = jnp.sum(doc_ids == last[None, :, None], axis=(0, 2), dtype=jnp.int32)
    pos_offset = n_present + jnp.where(last_before == last, state["pos_offset"], 0)

    def last_ones(name):
        axis = TOKEN_AXIS[name]
        if n_blocks == 1:
            recent = jnp.concatenate([xlcache[name], present[name][0]], axis=axis)
        else:
            whole = _window_then_blocks(name, xlcache, present)
            recent = jnp.moveaxis(whole[n_blocks:], 0, axis)  # [B, H, P / L, L, ...]
            recent = recent.reshape(*recent.shape[:axis], -1, *recent.shape[axis + 2 :])
        return jax.lax.slice_in_dim(recent, recent.shape[axis] - mem_len, None, axis=axis)

    return dict(pos_offset=pos_offset, xlcache={name: last_ones(name) for name in xlcache})
