"""VQAttention: one layer of dense causal attention in linear time (Transformer-VQ, arXiv 2309.16354).

Keys are quantized, so all keys that have left the window are described by a count and a mean value per code. For a
query q_i and the keys j <= i of its document, with d = i - j,

    score_ij = (q_i + u) . c_{z_j}  +  [d <= M] ((q_i + v) . r_d + window_bias)
    out_i    = sum_j softmax_j(score_ij) v_j
             = ( sum_{window} e^{score_ij} v_j + sum_s n_s e^{(q_i + u) . c_s} mean_s ) / (the same without v and mean)

since a key farther away than M contributes only through its code. So the result does not depend on how tokens are cut
into blocks, only on M, the reach of the relative bias. With `agg_cache` off, attention itself ends at d = M. In the
paper `window_bias` is 0. With a learned temperature, q_i has a factor for each head.

With key_shift the key of token j is made from W_k x_j + s * W_q x_{j-1}, where s is a learned vector. The query of a
token that equals x_{j-1} is similar to it before anything is learned, and v_j says what came next: an induction head in
one unit. (The smeared keys of Olsson et al., arXiv 2209.11895, are averages of the keys of two tokens.)

This file has the projections and the module. It uses: window.py, which cuts an update into blocks and finds the window
of each; cache.py, which counts the tokens that have left it; state.py, which carries both from update to update; vq.py,
which quantizes keys; scores.py, which makes the relative biases; attend.py, which has the softmax and its gradient;
pallas/, which has both as TPU kernels; plain.py, which has the same in readable form; and full.py, which has quadratic
attention for comparison. No code here uses a mesh.

Shapes: B rows, T tokens, R blocks of L, M window, S codes, Q query heads, H key heads, K key width, V value width,
D model width. Q = H, except with head_type mqa, where H = 1. Blocks come first: [R, B, ...].
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from tvq_pod.nn import state as states
from tvq_pod.nn.attend import Places, Sources, attend
from tvq_pod.nn.axes import constrain
from tvq_pod.nn.cache import caches, log_counts
from tvq_pod.nn.full import full_attention
from tvq_pod.nn.layers import Dropout, HeadProjection, OutputProjection, RMSNorm, sinusoids, with_names
from tvq_pod.nn.pallas.core import fused_attention
from tvq_pod.nn.pallas.fit import implementation
from tvq_pod.nn.plain import plain_attention
from tvq_pod.nn.scores import relative_bias
from tvq_pod.nn.types import TransformerConfig, VQSpec
from tvq_pod.nn.vq import VectorQuantizer
from tvq_pod.nn.window import TOKEN_AXIS, extend_window, join_blocks, leaving_chunks, split_blocks

FIRST_SHIFT = 2.0  # for key_shift: in a new model most of a key is the previous token


class VQAttention(nn.Module):
    """Attention over quantized keys. With head_type shga it is a gated attention unit (GAU, Hua et al., arXiv
    2202.10447); with mqa and mha there is no gate, and an MLP follows (mlp.py).

    The contract. `initial_state`, `apply` with `state` and `input_dict`, `method=VQAttention.attn`,
    `method=VQAttention.update_state` and `get_agg_biases` have the names, arguments and results that the tests of the
    paper's own implementation use (github.com/transformer-vq/transformer_vq, tests/nn/test_attn.py), so that module
    runs against this class. It requires four properties: outputs are causal; they do not depend on how tokens are cut
    into blocks; neither do gradients by queries; and documents do not see each other. tests/nn/test_contract.py makes
    the same calls. With `config.attention="plain"` any transformation goes through the module, forward-mode
    differentiation included; "xla" and "pallas" have hand-written gradients and are reverse-mode only.

    Our own model uses `initial_state`, `blocks` and, to decode, `biases`. `__call__` is for other models (see
    docs/library.md). What exists for the contract alone comes last, under a heading that says so.

    Parameters: norm, w_q, w_k, w_v, w_g (shga), w_o, w_r, u, v, log_sharpness (with a learned temperature), shift (with
    key_shift) and quantizer; all but the quantizer's have `param_dtype`.
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
        bias_init = with_names(nn.initializers.zeros, "heads", "key")
        self.u = self.param("u", bias_init, (c.n_head, c.d_k), c.param_dtype)
        self.v = self.param("v", bias_init, (c.n_head, c.d_k), c.param_dtype)
        if c.temperature == "learned":
            log_init = with_names(nn.initializers.zeros, "heads")
            self.log_sharpness = self.param("log_sharpness", log_init, (c.n_head,), c.param_dtype)
        if c.key_shift:
            shift_init = with_names(nn.initializers.constant(FIRST_SHIFT), "key_heads", "key")
            self.shift = self.param("shift", shift_init, (c.n_key_head, c.d_k), c.param_dtype)
        self.quantizer = VectorQuantizer(c) if c.attn_type == "vq" else None
        self.drop_sin = Dropout(c.p_dropsin, "timeless", c.is_train)

    @staticmethod
    def initial_state(config: TransformerConfig, batch_size: int) -> dict:
        """The state of `batch_size` streams that have read nothing; see state.py for its content."""
        return states.initial_state(config, batch_size)

    def __call__(self, state: dict, input_dict: dict) -> tuple[dict, dict]:
        """Applies the layer to T = R * L tokens.

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

    def blocks(self, state: dict, x: jax.Array, doc_ids: jax.Array, vq_spec: VQSpec | None) -> tuple[dict, dict]:
        """Applies the layer to R blocks: x [R, B, L, D], doc_ids and loss_mask [R, B, L]. Returns what `__call__` does,
        with res [R, B, L, D]."""
        c = self.config
        made, before = self.projected(x, doc_ids, vq_spec, state)
        state = {name: leaf for name, leaf in state.items() if name != "before"}
        q, v, gate, biases = (made[name] for name in ("q", "v", "gate", "biases"))
        if self.quantizer is None:
            present = dict(k_hat=made["k"], v=v if gate is None else nn.silu(v), doc_ids=doc_ids)
            recent = extend_window(state["xlcache"], present)
            by_key_head = grouped(q, c)
            position_q = by_key_head + _per_query_head(biases["v"], c)
            content_q = by_key_head + _per_query_head(biases["u"], c)
            out = full_attention(content_q, position_q, biases["r"], recent, c).reshape(*q.shape[:-1], c.d_v)
            out = out if gate is None else out * nn.silu(gate)
            new_state = states.next_state(present, state)
        else:
            present = dict(z=made["shortcodes"], k_hat=made["quantized"], v=v, doc_ids=doc_ids)
            out, new_state = self._attend(q, biases, present, gate, state)
        return new_state | before, dict(res=self.residual(out), **made["losses"])

    def projected(self, x: jax.Array, doc_ids: jax.Array, vq_spec: VQSpec | None, state: dict) -> tuple[dict, dict]:
        """Computes the inputs of attention from x [R, B, L, D]: the v and gate of `raw`, and what `prepared` returns
        for the rest; and the part of the next state that keys need."""
        raw = self.raw(x)
        k, before = self._shifted_keys(raw, doc_ids, state) if self.config.key_shift else (raw["k"], {})
        return {name: raw[name] for name in ("v", "gate")} | self.prepared(raw["q"], k, vq_spec), before

    def raw(self, x: jax.Array, inverse: jax.Array | None = None) -> dict:
        """Projects x [R, B, L, D] to q [R, B, Q, L, K] and k [R, B, H, L, K], before normalization; and to v [R, B, H,
        L, V] and gate [R, B, Q, L, V] or None, before their SiLU if there is a gate. inverse: see RMSNorm."""
        x = self.norm(x, inverse)
        projections = dict(q=self.w_q, k=self.w_k, v=self.w_v, gate=self.w_g)
        return {
            name: None if project is None else checkpoint_name(project(x), "projected")
            for name, project in projections.items()
        }

    def _shifted_keys(self, raw: dict, doc_ids: jax.Array, state: dict) -> tuple[jax.Array, dict]:
        """Computes the keys with key_shift, [R, B, H, L, K], before normalization, and the part of the next state that
        they need. The query heads of a key head are averaged."""
        of_key_head = jnp.mean(grouped(raw["q"], self.config), axis=3)
        of_before, last = states.shifted(of_key_head, doc_ids, state)
        factor = self.shift.astype(of_before.dtype)[None, None, :, None]
        k = constrain(raw["k"] + factor * of_before, "blocks", "batch", "key_heads", "token", "key")
        return k, dict(before=last)

    def prepared(
        self,
        q: jax.Array,
        k: jax.Array,
        vq_spec: VQSpec | None,
        shortcodes: jax.Array | None = None,
        inverse: tuple[jax.Array, jax.Array] | tuple[None, None] = (None, None),
        table: jax.Array | None = None,
    ) -> dict:
        """Prepares q and k from `raw` for attention. Returns q, normalized and scaled; k, and with attn_type vq also
        its shortcodes (those given, if any) and the quantized keys; biases; losses. inverse: those of q and k, see
        RMSNorm. table: `distances`, if already computed."""
        scale = self.config.d_k**-0.25
        q, k = (self.key_norm(x, known) * scale for x, known in zip((q, k), inverse, strict=True))
        if self.config.temperature == "learned":
            q *= sharpness(self.log_sharpness, q.dtype)[None, None, :, None, None]
        if self.quantizer is None:
            keys = dict(k=k, losses=dict(l_commit=jnp.zeros([]), l_codebook=jnp.zeros([]), metrics={}))
        else:
            quantized = self.quantizer(k, vq_spec, shortcodes)
            keys = {name: quantized[name] for name in ("shortcodes", "quantized")}
            keys["losses"] = {name: quantized[name] for name in ("l_commit", "l_codebook", "metrics")}
        return dict(q=q, biases=self.biases(table), **keys)

    def residual(self, out: jax.Array) -> jax.Array:
        """Projects the output of attention, [R, B, Q, L, V], to [R, B, L, D]."""
        return self.w_o(out)

    def _attend(self, q, biases: dict, present: dict, gate, state: dict) -> tuple[jax.Array, dict]:
        """Computes attention for R blocks: q [R, B, Q, L, K]; present: z, k_hat, v, doc_ids of the blocks; gate [R, B,
        Q, L, V] or None. With a gate, SiLU has not been applied yet to it and to v. Returns [R, B, Q, L, V], and the
        state after the last block."""
        c = self.config
        shape = (*q.shape[:-1], c.d_v)
        q = grouped(q, c)
        kind = implementation(c)
        if kind == "pallas" and q.shape[-2] == c.mem_len:
            gate = None if gate is None else grouped(gate, c)
            out, new_state = fused_attention(c, biases, q, present, gate, state)
            return out.reshape(shape), new_state
        if gate is not None:
            present, gate = present | dict(v=nn.silu(present["v"])), nn.silu(gate)
        if kind == "plain":
            biases = biases | {name: biases[name].reshape(c.n_key_head, -1, c.d_k) for name in ("u", "v")}
            out, new_state = plain_attention(c, biases, q, present, state)
        else:
            out, new_state = self._attend_at_once(q, biases, present, state)
        out = out.reshape(shape)
        return out if gate is None else out * gate, new_state

    def _attend_at_once(self, q, biases: dict, present: dict, state: dict) -> tuple[jax.Array, dict]:
        """Attends with attention=xla. q [R, B, H, G, L, K]. Returns [R, B, H, G, L, V], and the state."""
        c = self.config
        past, before, positions, new_state = states.surroundings(c, present, state)
        if not c.grad_thru_cache:
            past, before = jax.lax.stop_gradient((past, before))
        of_cache = c.agg_cache
        out = attend(
            c.mem_len,
            q + _per_query_head(biases["u"], c),
            relative_bias(q + _per_query_head(biases["v"], c), biases["r"], c.window_bias),
            Sources(past["k_hat"], present["k_hat"], biases["codes"] if of_cache else None),
            Sources(past["v"], present["v"], before["upper_div_lower"] if of_cache else None),
            Places(
                positions,
                present["doc_ids"] == before["latest_doc_id"][..., None] if of_cache else None,
                log_counts(before["lower"]) if of_cache else None,
            ),
        )
        return cast(jax.Array, out), new_state

    def biases(self, table: jax.Array | None = None) -> dict[str, jax.Array]:
        """The parameters that scores need besides queries and keys: codes [H, S, K] (not with attn_type full), u and v
        [Q, K], r [H, M + 1, K]; in `dtype`. table: `distances`, if already computed."""
        c = self.config
        table = constrain(self.drop_sin(distances(c) if table is None else table), None, None)
        codes = dict(codes=self.quantizer.codes().astype(c.dtype)) if self.quantizer else {}
        return dict(
            **codes,
            u=self.u.astype(c.dtype),
            v=self.v.astype(c.dtype),
            r=self.w_r(table.astype(c.dtype)) * c.d_k**-0.25,
        )

    # --- for the contract alone: one block at a time. The model itself does not use the methods below -----------------

    def attn(self, present_q, present_k, present_v, present_doc_ids, state: dict, vq_spec: VQSpec | None) -> dict:
        """Computes attention for one block of any length L, whatever `block_len` is. For attn_type vq.

        present_q: [B, Q, L, K] and present_k: [B, H, L, K], normalized and scaled, keys not yet quantized. present_v:
        [B, H, L, V]. present_doc_ids: int32 [B, L]. vq_spec: loss_mask [B, L], or None.
        Returns attn_out [B, L, Q * V]; recent_z [B, H, M + L], recent_k_hat [B, H, M + L, K], recent_v
        [B, H, M + L, V], recent_doc_ids [B, M + L], which are the window followed by the block; and the quantizer's
        l_commit, l_codebook, metrics.
        """
        assert self.quantizer is not None
        present_q, present_k, present_v = (x.astype(self.config.dtype) for x in (present_q, present_k, present_v))
        quantized = self.quantizer(present_k[None], None if vq_spec is None else VQSpec(vq_spec.loss_mask[None]))
        present = dict(
            z=quantized["shortcodes"],
            k_hat=quantized["quantized"],
            v=present_v[None],
            doc_ids=present_doc_ids[None],
        )
        out, _ = self._attend(present_q[None], self.biases(), present, None, state)
        batch_size, _, block_len, _ = out.shape[1:]
        return dict(
            attn_out=jnp.swapaxes(out[0], 1, 2).reshape(batch_size, block_len, -1),
            **{f"recent_{name}": array for name, array in extend_window(state["xlcache"], present).items()},
            **{name: quantized[name] for name in ("l_commit", "l_codebook", "metrics")},
        )

    def update_state(self, recent_z, recent_k_hat, recent_v, recent_doc_ids, state: dict) -> dict:
        """The state after a block, from the results of `attn` and the state before it. With key_shift, the leaf
        `before` is missing: it is made from queries, which only `__call__` has."""
        recent = dict(z=recent_z, k_hat=recent_k_hat, v=recent_v, doc_ids=recent_doc_ids)
        mem_len = self.config.mem_len
        present = {n: jax.lax.slice_in_dim(x, mem_len, None, axis=TOKEN_AXIS[n])[None] for n, x in recent.items()}
        _, aggcache = caches(state["aggcache"], leaving_chunks(state["xlcache"], present), self.config.reduction)
        return states.next_state(present, state) | dict(aggcache=aggcache)

    @staticmethod
    def get_agg_biases(counts: jax.Array) -> jax.Array:
        """Calls `log_counts` (cache.py), under the contract's name."""
        return log_counts(counts)


def sharpness(log_sharpness: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The factor on the queries of each head with a learned temperature, [Q], from its logarithm."""
    return jnp.exp(log_sharpness.astype(jnp.float32)).astype(dtype)


def distances(config: TransformerConfig) -> jax.Array:
    """Features of the distances 0 .. M, float32 [M + 1, D], the same for all layers."""
    return sinusoids(jnp.arange(config.mem_len + 1), config.d_model)


def grouped(q: jax.Array, config: TransformerConfig) -> jax.Array:
    """Groups query heads by their key head: [R, B, Q, L, width] -> [R, B, H, G, L, width]."""
    return q.reshape(*q.shape[:2], config.n_key_head, -1, *q.shape[3:])


def _per_query_head(bias: jax.Array, config: TransformerConfig) -> jax.Array:
    """Reshapes a bias [Q, K] to [1, 1, H, G, 1, K]."""
    return bias.reshape(1, 1, config.n_key_head, -1, 1, config.d_k)
