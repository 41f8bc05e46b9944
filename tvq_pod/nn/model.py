"""The Transformer-VQ language model: embeddings, layers of two units, logits.

The layers' parameters and states are stacked, and one lax.scan runs over them, or the loop of layer_loop.py if kernels
compute attention: compile time does not grow with depth.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng

from tvq_pod.nn.attn import VQAttention, distances
from tvq_pod.nn.axes import constrain, gathered, placement
from tvq_pod.nn.layer_loop import RESIDUAL_STREAM, Given, layer_loop
from tvq_pod.nn.layers import Dropout, RMSNorm, sinusoids, with_names
from tvq_pod.nn.mlp import MLP
from tvq_pod.nn.pallas.fit import implementation
from tvq_pod.nn.state import positions_of, state_axes
from tvq_pod.nn.types import UNITS, TransformerConfig, VQSpec
from tvq_pod.nn.window import join_blocks, split_blocks

_KEEP = jax.checkpoint_policies
REMAT_POLICIES = {  # by attn_type and remat: what each unit keeps for the backward pass; the rest is recomputed
    ("vq", "full"): _KEEP.nothing_saveable,
    ("full", "full"): _KEEP.save_only_these_names("attended"),  # quadratic attention recomputes its scores anyway
    **{(kind, "dots"): _KEEP.dots_with_no_batch_dims_saveable for kind in ("vq", "full")},
    **{(kind, "projections"): _KEEP.save_only_these_names("projected", "attended") for kind in ("vq", "full")},
}


class Layer(nn.Module):
    """A layer of two units, each with its residual connection: two attention units, or attention followed by an MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: dict, doc_ids: jax.Array, vq_spec: VQSpec | None):
        """Maps x [R, B, L, D], with doc_ids and loss_mask [R, B, L], to x and (the next state, l_commit,
        l_codebook)."""
        c, new_state, l_commit, l_codebook = self.config, {}, 0.0, 0.0
        attention_cls, mlp_cls = VQAttention, MLP
        if c.remat != "none":
            # a scan over layers keeps the compiler from undoing the remat; without a scan, `prevent_cse` must do so
            policy = dict(policy=REMAT_POLICIES[c.attn_type, c.remat], prevent_cse=c.unroll > 1)
            attention_cls, mlp_cls = nn.remat(VQAttention, methods=["blocks"], **policy), nn.remat(MLP, **policy)
        for name in UNITS:
            if name in c.attention_units:
                new_state[name], out = attention_cls(c, name=name).blocks(state[name], x, doc_ids, vq_spec)
                x = x + out["res"]
                l_commit += out["l_commit"]
                l_codebook += out["l_codebook"]
            else:
                x = x + mlp_cls(c, name=name)(x)
        return constrain(x, *RESIDUAL_STREAM), (new_state, l_commit, l_codebook)


class Transformer(nn.Module):
    """The complete model. Parameters: embedding, layers (stacked: a leading axis of n_layer), and, depending on
    settings, pe_scale, norm_out and w_out."""

    config: TransformerConfig

    @staticmethod
    def initial_state(config: TransformerConfig, batch_size: int) -> dict:
        """The state of all layers for streams that have read nothing: VQAttention's for each unit, with a leading axis
        of n_layer."""

        def stacked():
            unit = VQAttention.initial_state(config, batch_size)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.n_layer, *x.shape)), unit)

        return {name: stacked() for name in config.attention_units}  # no array is shared: a step may donate each

    @staticmethod
    def state_axes(config: TransformerConfig) -> dict:
        """The logical name of every axis of `initial_state`."""
        axes = jax.tree.map(lambda names: ("layers", *names), state_axes(config), is_leaf=_is_names)
        return {name: axes for name in config.attention_units}

    @nn.compact
    def __call__(
        self,
        state: dict,
        inputs: jax.Array,
        doc_ids: jax.Array,
        vq_spec: VQSpec | None = None,
        targets: jax.Array | None = None,
        with_log_z: bool = False,
    ):
        """Applies the model. inputs, doc_ids, targets: int32 [B, T], T a multiple of block_len.

        Returns (next state, dict): logits float32 [B, T, n_vocab], or, if there are targets, losses float32 [B, T],
        their cross-entropy in nats, computed without holding all logits of a large vocabulary at once, and, if
        with_log_z, log_z float32 [B, T], the log of the sum of exp(logits); l_commit (summed over units, mean over
        positions) and l_codebook (see vq.py), float32 scalars.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        embedding = self.param(
            "embedding",
            with_names(nn.initializers.normal(1.0), "vocab", "embed"),
            (c.n_vocab, c.d_model),
            c.param_dtype,
        )
        in_use = gathered(embedding.astype(dtype), ("vocab", "embed"))
        with jax.named_scope("embed"):
            x = embed(inputs, in_use)
        if c.pe_abs:
            first_unit = jax.tree.map(lambda leaf: leaf[0], state[UNITS[0]])
            positions = join_blocks(positions_of(first_unit, split_blocks(doc_ids, c.block_len)))
            pe_scale = self.param("pe_scale", with_names(nn.initializers.ones), (), c.param_dtype)
            x += (pe_scale * sinusoids(positions, c.d_model)).astype(dtype)
        x = constrain(split_blocks(x, c.block_len), *RESIDUAL_STREAM)
        x = Dropout(c.p_dropemb, "ephemeral", c.is_train)(x)
        vq_spec = vq_spec and vq_spec.replace(loss_mask=split_blocks(vq_spec.loss_mask, c.block_len))

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "ephemeral": True, "timeless": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast)),  # flax declares this as an int
            out_axes=0,
            length=c.n_layer,
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="layers")
        doc_blocks = split_blocks(doc_ids, c.block_len)
        if self._has_own_loop():
            params = self.get_variable("params", "layers")
            given = Given(self._rngs_of_layers(), doc_blocks, vq_spec, distances(c))
            x, new_state, (l_commit, l_codebook) = cast(tuple, layer_loop(c, params, x, state, given))
        else:
            x, (new_state, l_commit, l_codebook) = layers(x, state, doc_blocks, vq_spec)
        if c.e_norm:
            x = RMSNorm(c, use_scale=True, name="norm_out")(x)
        if c.e_tie:
            output = in_use.T
        else:
            init = with_names(nn.initializers.lecun_normal(), "embed", "vocab")
            output = self.param("w_out", init, (c.d_model, c.n_vocab), c.param_dtype)
            output = gathered(output.astype(dtype), ("embed", "vocab"))
        if targets is None:
            with jax.named_scope("logits"):
                result = dict(logits=join_blocks(logits_of(x, output, c.e_scale)))
        else:
            with jax.named_scope("loss"):
                of_tokens = token_losses(x, output, split_blocks(targets, c.block_len), c.e_scale, with_log_z)
            result = {name: join_blocks(of_token) for name, of_token in of_tokens.items()}
        return new_state, result | dict(l_commit=jnp.sum(l_commit), l_codebook=jnp.sum(l_codebook))

    def _has_own_loop(self) -> bool:
        """Whether layer_loop.py runs the layers instead of flax's scan. It does not support key_shift."""
        c = self.config
        fits = c.mem_len == c.block_len and not c.key_shift
        return implementation(c) == "pallas" and fits and not self.is_initializing()

    def _rngs_of_layers(self) -> dict[str, LazyRng]:
        """Splits random keys as flax's scan would."""
        assert self.scope is not None
        rngs = cast(dict[str, LazyRng], self.scope.rngs)
        n_layer = self.config.n_layer
        return {n: LazyRng(jax.random.split(rng.rng, n_layer), (*rng.suffix, "layers")) for n, rng in rngs.items()}


def embed(inputs: jax.Array, embedding: jax.Array) -> jax.Array:
    """Looks up rows of embedding [n_vocab, D]. A small vocabulary uses a matmul, which is faster on a TPU than a
    gather, and its gradient much faster than a scatter; in bfloat16 it is just as exact."""
    if embedding.dtype != jnp.bfloat16 or len(embedding) > embedding.shape[1]:
        return jnp.take(embedding, inputs, axis=0)
    return jax.nn.one_hot(inputs, len(embedding), dtype=embedding.dtype) @ embedding


def logits_of(x: jax.Array, output: jax.Array, scale: float) -> jax.Array:
    """Computes logits, with operands in the compute dtype and sums and logits in float32."""
    return jnp.matmul(x, output, preferred_element_type=jnp.float32) * scale


def token_losses(
    x: jax.Array, output: jax.Array, targets: jax.Array, scale: float, with_log_z: bool = False
) -> dict[str, jax.Array]:
    """Returns losses, cross-entropy in nats, float32 [R, B, L], from x [R, B, L, D], output [D, n_vocab] and targets
    [R, B, L]; if with_log_z, log_z as well, the log of the sum of exp(logits).

    With a large vocabulary only the logits of one block at a time are held; the backward pass recomputes them.
    """
    if output.shape[1] <= output.shape[0]:
        return _losses("...ld,dv->...lv", x, output, targets, scale, with_log_z)

    # Every shard of blocks and rows processes its own blocks, with a copy of the matrix: so the gradients of all blocks
    # are added locally, and summed over devices once, not once per block.
    n_shards = placement().n_shards("blocks"), placement().n_shards("batch")
    copies = jnp.broadcast_to(output, (*n_shards, *output.shape))
    copies = constrain(copies, "blocks", "batch", "embed", "vocab")

    def by_turn(x):  # [R, B, ...] -> [turns, shards of blocks, shards of rows, B of each, ...]
        x = x.reshape(n_shards[0], -1, n_shards[1], x.shape[1] // n_shards[1], *x.shape[2:])
        return jnp.swapaxes(x, 0, 1)

    @jax.checkpoint
    def of_turn(blocks):
        return _losses("srbld,srdv->srblv", blocks[0], copies, blocks[1], scale, with_log_z)

    found = jax.lax.map(of_turn, (by_turn(x), by_turn(targets)))
    return {name: jnp.swapaxes(of_turns, 0, 1).reshape(targets.shape) for name, of_turns in found.items()}


def _losses(
    product: str, x: jax.Array, output: jax.Array, targets: jax.Array, scale: float, with_log_z: bool
) -> dict[str, jax.Array]:
    logits = jnp.einsum(product, x, output, preferred_element_type=jnp.float32) * scale
    names = ("blocks", "batch", "token", "vocab") if logits.ndim == 4 else ("blocks", "batch", None, "token", "vocab")
    logits = constrain(logits, *names)
    is_target = targets[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = dict(losses=log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
    return losses | (dict(log_z=log_z) if with_log_z else {})


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def is_vector(path: tuple) -> bool:
    """Whether a path leads to gains, biases or a scale, which have no weight decay."""
    return getattr(path[-1], "key", None) not in ("kernel", "embedding", "w_out")


def is_stacked(path: tuple) -> bool:
    """Whether a path leads to parameters of layers, which are stacked with a leading axis of n_layer."""
    return getattr(path[0], "key", None) == "layers"
