"""The second unit of a layer with head_type mqa or mha: an MLP, as in the Transformer (arXiv 1706.03762), with GELU."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.layers import HeadProjection, OutputProjection, RMSNorm
from tvq_pod.nn.types import TransformerConfig


class MLP(nn.Module):
    """x [R, B, L, D] -> what it adds to the residual stream, [R, B, L, D]. Parameters: norm, w_up, w_down."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = RMSNorm(c, use_scale=True, name="norm")(x)
        hidden = HeadProjection(c, 1, c.hidden_width, (None, "hidden"), name="w_up")(x)
        hidden = nn.gelu(checkpoint_name(hidden, "projected"))
        return OutputProjection(c, (None, "hidden"), name="w_down")(hidden)
