"""The vector quantizer: each key becomes the nearest of its head's S codes.

Gradients go straight through to the keys, and the commit loss pulls keys to their codes. The codes themselves follow a
moving average of the keys that chose them, which codebook.py defines. This file computes the sums that the average
needs and passes them to the training step as gradients: `l_codebook` is 0, and its gradient by (codebook, count) *is*
(sum of keys, number of keys) of each code. So the sums pass through scans, rematerialization and batch sharding like
any gradient, outside of the forward pass.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.layers import with_names
from tvq_pod.nn.scores import as_last_axes
from tvq_pod.nn.types import TransformerConfig, VQSpec


def nearest_code(keys: jax.Array, codebook: jax.Array) -> jax.Array:
    """Finds the index of the code with the least squared distance; ties go to the lower index.

    keys: [..., H, T, K]; codebook: [H, S, K]. Returns shortcodes z, int32 [..., H, T].
    """
    keys = keys.astype(jnp.float32)
    half_sq_norms = 0.5 * jnp.sum(jnp.square(codebook), axis=-1)  # [H, S]
    # |k - c|^2 / 2 without the term that all codes share
    dists = as_last_axes(half_sq_norms[:, None, :], keys) - jnp.einsum("...htk,hsk->...hts", keys, codebook)
    return jnp.argmin(dists, axis=-1).astype(jnp.int32)


def lookup(shortcodes: jax.Array, codebook: jax.Array) -> jax.Array:
    """The codes of shortcodes [..., H, T] in codebook [H, S, K], as [..., H, T, K].

    In bfloat16 it uses a matmul, which is faster on a TPU than a gather. Both are exact.
    """
    if codebook.dtype == jnp.bfloat16:
        onehot = jax.nn.one_hot(shortcodes, codebook.shape[1], dtype=codebook.dtype)
        return jnp.einsum("...hts,hsk->...htk", onehot, codebook)
    return jax.vmap(lambda z, c: c[z], in_axes=(-2, 0), out_axes=-3)(shortcodes, codebook)


class VectorQuantizer(nn.Module):
    """The codebooks of one attention layer. Parameters: codebook [H, S, K] and count [H, S], float32."""

    config: TransformerConfig

    def setup(self):
        n_head, n_code, d_k = self.config.n_key_head, self.config.n_code, self.config.d_k
        # Keys have squared norm sqrt(K) (see attn.py); codes start on that scale.
        codebook_init = nn.initializers.normal(stddev=d_k**-0.25)
        self.codebook = self.param(
            "codebook",
            with_names(codebook_init, "key_heads", "codes", "key"),
            (n_head, n_code, d_k),
            jnp.float32,
        )
        self.count = self.param(
            "count",
            with_names(nn.initializers.ones, "key_heads", "codes"),
            (n_head, n_code),
            jnp.float32,
        )

    def codes(self) -> jax.Array:
        """The codebook, float32 [H, S, K], as a constant for every gradient."""
        return jax.lax.stop_gradient(self.codebook)

    def __call__(self, keys: jax.Array, vq_spec: VQSpec | None, shortcodes: jax.Array | None = None) -> dict:
        """Quantizes keys [..., H, T, K]; vq_spec: loss_mask [..., T]; None means that every position counts.
        shortcodes: those of these keys, if already known.

        Returns a dict:
          shortcodes: int32 [..., H, T].
          quantized: like keys; its value is the code, its gradient goes straight through to the keys.
          l_commit: float32 scalar, mean over positions and heads of |k - code|^2; pulls keys to codes.
          l_codebook: 0; only its gradient matters, see the head of this file. metrics: code_perplexity (exp of the
          entropy of code use, 1 .. S) and code_usage (share of codes used),
            float32 scalars, means over heads.
        """
        codes = self.codes()
        z = nearest_code(jax.lax.stop_gradient(keys), codes) if shortcodes is None else shortcodes
        z = checkpoint_name(z, "projected")
        chosen = lookup(z, codes.astype(keys.dtype))
        mask = jnp.ones_like(z[..., 0, :]) if vq_spec is None else vq_spec.loss_mask
        mask = mask.astype(jnp.float32)[..., None, :]  # [..., 1, T]

        carry_sums = _carry_sums_plainly if self.config.attention == "plain" else _carry_sums
        n_positions = jnp.sum(mask) if vq_spec is None or vq_spec.n_positions is None else vq_spec.n_positions
        n_terms = jnp.maximum(n_positions, 1.0) * self.config.n_key_head
        sq_errors = jnp.sum(jnp.square(keys.astype(jnp.float32) - chosen.astype(jnp.float32)), axis=-1)  # [..., H, T]
        return dict(
            shortcodes=z,
            quantized=_straight_through(keys, chosen),
            l_commit=jnp.sum(mask * sq_errors) / n_terms,
            l_codebook=carry_sums(self.codebook, self.count, keys, z, mask),
            metrics=code_metrics(code_sums(keys, z, mask, self.config.n_code)[1]),
        )


def code_sums(keys, shortcodes, mask, n_code: int) -> tuple[jax.Array, jax.Array]:
    """The sum [H, S, K] and number [H, S] of the keys [..., H, T, K] of each code, float32, where mask [..., 1, T] is
    1."""
    z = jnp.where(mask > 0, shortcodes, -1)  # -1: no code
    onehot = jax.nn.one_hot(z, n_code, dtype=keys.dtype)
    key_sums = jnp.einsum("...hts,...htk->hsk", onehot, keys, preferred_element_type=jnp.float32)
    is_code = z[..., None, :] == as_last_axes(jnp.arange(n_code, dtype=z.dtype)[:, None], z[..., None])
    return key_sums, jnp.einsum("...hst->hs", is_code.astype(jnp.float32))


def code_metrics(counts: jax.Array) -> dict:
    """Computes code_perplexity and code_usage, float32 [...], means over heads, from counts [..., H, S]."""
    use = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
    entropy = -jnp.sum(use * jnp.log(jnp.maximum(use, 1e-30)), axis=-1)
    share = jnp.mean((counts > 0).astype(jnp.float32), axis=-1)
    return dict(code_perplexity=jnp.mean(jnp.exp(entropy), axis=-1), code_usage=jnp.mean(share, axis=-1))


@jax.custom_jvp
def _straight_through(keys, codes):
    """Returns the codes, with a gradient that goes to the keys."""
    return codes


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def _carry_sums_plainly(codebook, count, keys, shortcodes, mask):
    """`_carry_sums` without a hand-written gradient: the sums are computed in the forward pass."""
    key_sums, counts = jax.lax.stop_gradient(code_sums(keys, shortcodes, mask, count.shape[-1]))
    carried = jnp.sum(codebook * key_sums) + jnp.sum(count * counts)
    return carried - jax.lax.stop_gradient(carried)


@jax.custom_vjp
def _carry_sums(codebook, count, keys, shortcodes, mask):
    """Returns 0, with gradients by codebook and count that are `code_sums`, computed only in the backward pass."""
    return jnp.zeros([])


def _carry_sums_forward(codebook, count, keys, shortcodes, mask):
    return jnp.zeros([]), (keys, shortcodes, mask, count)


def _carry_sums_backward(kept, cotangent):
    keys, shortcodes, mask, count = kept
    key_sums, counts = code_sums(keys, shortcodes, mask, count.shape[-1])
    return cotangent * key_sums, cotangent * counts, None, None, None


_carry_sums.defvjp(_carry_sums_forward, _carry_sums_backward)
