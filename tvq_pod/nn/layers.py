"""Small pieces that several modules share: sinusoids, projections onto heads, positions in a document."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tvq_pod.nn.types import TransformerConfig

MAX_WAVELENGTH = 100_000.0


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """Sine and cosine features (Vaswani et al., arXiv 1706.03762, section 3.5), wavelengths 2 pi .. 2 pi * 1e5.

    positions: any shape, integers. Returns float32 [..., width]; an odd last feature is 0.
    """
    half = width // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), MAX_WAVELENGTH**-exponents)
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(features, [(0, 0)] * positions.ndim + [(0, width - 2 * half)])


def doc_positions(doc_ids: jax.Array, latest_doc_id: jax.Array, pos_offset: jax.Array) -> jax.Array:
    """Position of each token in its document.

    doc_ids: int32 [B, T]. latest_doc_id: int32 [B], the id of the token before the first; pos_offset: int32 [B], how
    many tokens of that document have passed. Returns int32 [B, T].
    """
    before = jnp.concatenate([latest_doc_id[:, None], doc_ids[:, :-1]], axis=1)
    t = jnp.arange(doc_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.where(doc_ids != before, t, -1)
    latest_start = jax.lax.cummax(starts, axis=1)
    return jnp.where(latest_start < 0, pos_offset[:, None] + t, t - latest_start)


class HeadProjection(nn.Module):
    """x [..., D] -> [B, H, T, width] (for x [B, T, D]) or [H, T, width] (for x [T, D]); no bias."""

    config: TransformerConfig
    width: int
    width_name: str  # the logical name of that axis

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.DenseGeneral(
            features=(self.config.n_head, self.width),
            use_bias=False,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), ("embed", "heads", self.width_name)
            ),
            name="proj",
        )(x)
        return jnp.swapaxes(y, -3, -2)


def rms_norm(config: TransformerConfig, *, use_scale: bool, name: str | None = None) -> nn.RMSNorm:
    """Root-mean-square normalisation over the last axis, reduced in float32; its gain, if any, is named `scale`."""
    return nn.RMSNorm(
        use_scale=use_scale,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        name=name,
    )
