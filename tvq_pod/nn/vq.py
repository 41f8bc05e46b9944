"""The vector quantizer: each key becomes the nearest of its head's S codes.

The codes are parameters that no optimizer touches. They follow an exponential moving average (EMA) of the keys that
chose them (Transformer-VQ, arXiv 2309.16354, section 3.4; van den Oord et al., arXiv 1711.00937, appendix A.1):

    N_s <- g N_s + (1 - g) n_s
    c_s <- (g N_s c_s + (1 - g) sum of the keys with shortcode s) / N_s

with n_s the number of keys of the update, over the whole global batch, whose shortcode is s, and g = `c_gamma`.
A code with n_s = 0 keeps its place exactly.

How the sums reach the training step: `l_codebook` is linear in (codebook, count), and its gradient *is* (sum of keys,
n). So they pass through scans, rematerialisation and batch sharding as any gradient does, and `ema_update` takes them
from the gradient's tree.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tvq_pod.nn.types import TransformerConfig, VQSpec

# An unused code's N_s shrinks by g each update; below this it stays, or it would underflow to a division by zero.
MIN_COUNT = 1e-6


def nearest_code(keys: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the code with the least squared distance; ties go to the lower index.

    keys: [B, H, T, K]; codebook: [H, S, K]. Returns shortcodes z, int32 [B, H, T].
    """
    keys = keys.astype(jnp.float32)
    half_sq_norms = 0.5 * jnp.sum(jnp.square(codebook), axis=-1)  # [H, S]
    # |k - c|^2 / 2 without the term that all codes share
    dists = half_sq_norms[None, :, None, :] - jnp.einsum("bhtk,hsk->bhts", keys, codebook)
    return jnp.argmin(dists, axis=-1).astype(jnp.int32)


def lookup(shortcodes: jax.Array, codebook: jax.Array) -> jax.Array:
    """The codes of shortcodes [B, H, T] in codebook [H, S, K], as [B, H, T, K]."""
    return jax.vmap(lambda z, c: c[z], in_axes=(1, 0), out_axes=1)(shortcodes, codebook)


class VectorQuantizer(nn.Module):
    """Codebooks of one attention layer. Parameters: codebook [H, S, K] and count [H, S], float32."""

    config: TransformerConfig

    def setup(self):
        n_head, n_code, d_k = self.config.n_head, self.config.n_code, self.config.d_k
        # Keys have squared norm sqrt(K) (see attn.py); codes start on that scale.
        codebook_init = nn.initializers.normal(stddev=d_k**-0.25)
        self.codebook = self.param(
            "codebook",
            nn.with_logical_partitioning(codebook_init, ("heads", "codes", "key")),
            (n_head, n_code, d_k),
            jnp.float32,
        )
        self.count = self.param(
            "count",
            nn.with_logical_partitioning(nn.initializers.ones, ("heads", "codes")),
            (n_head, n_code),
            jnp.float32,
        )

    def codes(self) -> jax.Array:
        """The codebook, float32 [H, S, K], as a constant to every gradient."""
        return jax.lax.stop_gradient(self.codebook)

    def __call__(self, keys: jax.Array, vq_spec: VQSpec | None) -> dict:
        """Quantizes keys [B, H, T, K]; `vq_spec` None means that every position counts.

        Returns a dict:
          shortcodes: int32 [B, H, T].
          quantized: like keys; its value is the code, its gradient goes straight through to the keys.
          l_commit: float32 scalar, mean over positions and heads of |k - code|^2; pulls keys to codes.
          l_codebook: float32 scalar without meaning as a value; see the head of this file.
          metrics: code_perplexity (exp of the entropy of code use, 1 .. S) and code_usage (share of codes used),
            float32 scalars, means over heads.
        """
        codes = self.codes()
        z = nearest_code(jax.lax.stop_gradient(keys), codes)
        chosen = lookup(z, codes)
        mask = jnp.ones(z.shape[::2], jnp.float32) if vq_spec is None else vq_spec.loss_mask.astype(jnp.float32)

        n_positions = jnp.maximum(jnp.sum(mask), 1.0) * self.config.n_head
        sq_errors = jnp.sum(jnp.square(keys.astype(jnp.float32) - chosen), axis=-1)  # [B, H, T]
        l_commit = jnp.sum(mask[:, None, :] * sq_errors) / n_positions

        onehot = jax.nn.one_hot(z, self.config.n_code, dtype=jnp.float32) * mask[:, None, :, None]
        counts = jnp.sum(onehot, axis=(0, 2))  # [H, S]
        key_sums = jnp.einsum("bhts,bhtk->hsk", onehot, jax.lax.stop_gradient(keys).astype(jnp.float32))
        l_codebook = jnp.sum(self.codebook * key_sums) + jnp.sum(self.count * counts)

        use = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
        entropy = -jnp.sum(use * jnp.log(jnp.maximum(use, 1e-30)), axis=-1)
        return dict(
            shortcodes=z,
            # k - k is exactly 0, so the value is exactly the code, as the cache has it
            quantized=chosen.astype(keys.dtype) + (keys - jax.lax.stop_gradient(keys)),
            l_commit=l_commit,
            l_codebook=l_codebook,
            metrics=dict(
                code_perplexity=jnp.mean(jnp.exp(entropy)), code_usage=jnp.mean((counts > 0).astype(jnp.float32))
            ),
        )


def ema_update(quantizer_params: dict, sums: dict, gamma: float) -> dict:
    """One step of the codebook's moving average; the equations are at the head of this file.

    quantizer_params: codebook [..., S, K] and count [..., S], float32; leading axes are heads, layers.
    sums: the gradient of `l_codebook`: sum of keys per code under "codebook", number of keys under "count".
    Returns the new quantizer_params.
    """
    codebook, count = quantizer_params["codebook"], quantizer_params["count"]
    key_sums, n = sums["codebook"], sums["count"]
    new_count = jnp.maximum(gamma * count + (1.0 - gamma) * n, MIN_COUNT)
    # Written as a step from the old place: it is exactly zero where n is zero.
    step = (1.0 - gamma) * (key_sums - n[..., None] * codebook) / new_count[..., None]
    return dict(codebook=codebook + step, count=new_count)
