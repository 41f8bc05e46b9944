"""The Transformer-VQ language model: embeddings, layers of two gated units, logits.

The layers' parameters and states are stacked, and one lax.scan goes through them: compile time does not grow with
depth.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tvq_pod.nn.attn import VQAttention
from tvq_pod.nn.layers import doc_positions, rms_norm, sinusoids
from tvq_pod.nn.types import TransformerConfig, VQSpec

UNITS = ("unit0", "unit1")  # of one layer


class Layer(nn.Module):
    """Two gated units, each with its residual connection."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: dict, doc_ids: jax.Array, vq_spec: VQSpec | None):
        """x [B, T, D] -> x and (the next state, l_commit, l_codebook, metrics by unit)."""
        # the scan over layers already keeps the compiler from undoing it: no need for prevent_cse
        unit_cls = nn.remat(VQAttention, prevent_cse=False) if self.config.remat == "full" else VQAttention
        new_state, l_commit, l_codebook, metrics = {}, 0.0, 0.0, {}
        for name in UNITS:
            inputs = dict(input_features=x, doc_ids=doc_ids, vq_spec=vq_spec)
            new_state[name], out = unit_cls(self.config, name=name)(state[name], inputs)
            x = x + out["res"]
            l_commit += out["l_commit"]
            l_codebook += out["l_codebook"]
            metrics[name] = out["metrics"]
        return x, (new_state, l_commit, l_codebook, metrics)


class Transformer(nn.Module):
    """The whole model. Parameters: embed, layers (stacked: a leading axis of n_layer), and by settings pe_scale,
    norm_out and w_out."""

    config: TransformerConfig

    @staticmethod
    def initial_state(config: TransformerConfig, batch_size: int) -> dict:
        """State of all layers for streams that have read nothing: VQAttention's per unit, behind an axis of n_layer."""

        def stacked():
            unit = VQAttention.initial_state(config, batch_size)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.n_layer, *x.shape)), unit)

        return {name: stacked() for name in UNITS}  # no array twice: a step may donate each

    @staticmethod
    def state_axes(config: TransformerConfig) -> dict:
        """The logical name of every axis of `initial_state`."""
        axes = jax.tree.map(lambda names: ("layers", *names), VQAttention.state_axes(config), is_leaf=_is_names)
        return {name: axes for name in UNITS}

    @nn.compact
    def __call__(self, state: dict, inputs: jax.Array, doc_ids: jax.Array, vq_spec: VQSpec | None = None):
        """inputs, doc_ids: int32 [B, T], T a multiple of block_len.

        Returns (next state, dict): logits float32 [B, T, n_vocab]; l_commit (summed over units, mean over positions)
        and l_codebook, float32 scalars; metrics, a dict of float32 scalars, means over units.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        embed = nn.Embed(
            c.n_vocab,
            c.d_model,
            dtype=dtype,
            param_dtype=c.param_dtype,
            embedding_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            name="embed",
        )
        x = embed(inputs)
        if c.pe_abs:
            first_unit = jax.tree.map(lambda leaf: leaf[0], state[UNITS[0]])
            positions = doc_positions(doc_ids, first_unit["xlcache"]["doc_ids"][:, -1], first_unit["pos_offset"])
            scale_init = nn.with_logical_partitioning(nn.initializers.ones, ())
            pe_scale = self.param("pe_scale", scale_init, (), c.param_dtype)
            x += (pe_scale * sinusoids(positions, c.d_model)).astype(dtype)
        x = nn.Dropout(c.p_dropemb, rng_collection="ephemeral", deterministic=not c.is_train)(x)

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "ephemeral": True, "timeless": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=c.n_layer,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="layers")
        x, (new_state, l_commit, l_codebook, metrics) = layers(x, state, doc_ids, vq_spec)

        if c.e_norm:
            x = rms_norm(c, use_scale=True, name="norm_out")(x)
        if c.e_tie:
            output = embed.embedding.T
        else:
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
            output = self.param("w_out", init, (c.d_model, c.n_vocab), c.param_dtype)
        # operands in the compute dtype, sums and logits in float32
        logits = jnp.matmul(x, output.astype(dtype), preferred_element_type=jnp.float32)
        mean_metrics = {
            name: jnp.mean(jnp.stack([metrics[unit][name] for unit in UNITS])) for name in metrics[UNITS[0]]
        }
        return new_state, dict(
            logits=logits * c.e_scale,
            l_commit=jnp.sum(l_commit),
            l_codebook=jnp.sum(l_codebook),
            metrics=mean_metrics,
        )


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def is_codebook(path: tuple) -> bool:
    """Whether a path in the parameters' tree (of jax.tree_util keys) leads into a quantizer, whose parameters follow
    their moving average and are no optimizer's business."""
    return any(getattr(key, "key", None) == "quantizer" for key in path)


def is_vector(path: tuple) -> bool:
    """Whether a path leads to gains, biases or a scale: what weight decay leaves alone."""
    return getattr(path[-1], "key", None) not in ("kernel", "embedding", "w_out")
