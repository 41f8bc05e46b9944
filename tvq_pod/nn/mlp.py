"""The second unit of a layer with head_type mqa or mha: an MLP, as in the Transformer (arXiv 1706.03762), with GELU."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.layers import HeadProjection, OutputProjection, RMSNorm
from tvq_pod.nn.types import TransformerConfig


class MLP(nn.Module):
    """Maps x [R, B, L, D] to the term that it adds to the residual stream, [R, B, L, D]. Parameters: norm, w_up,
    w_down."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.norm = RMSNorm(c, use_scale=True)
        self.w_up = HeadProjection(c, 1, c.hidden_width, (None, "hidden"))
        self.w_down = OutputProjection(c, (None, "hidden"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.residual(self.raw(x))

    def raw(self, x: jax.Array, inverse: jax.Array | None = None) -> jax.Array:
        """Projects x [R, B, L, D] to [R, B, 1, L, width], before the GELU. inverse: see RMSNorm."""
        return checkpoint_name(self.w_up(self.norm(x, inverse)), "projected")

    def residual(self, hidden: jax.Array) -> jax.Array:
        """Applies the GELU to the result of `raw`, and projects it to [R, B, L, D]."""
        return self.w_down(nn.gelu(hidden))
