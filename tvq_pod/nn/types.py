"""The two frozen records that every layer takes: the model's config, and which positions count."""

import flax.struct
import jax

from tvq_pod.config.model import UNITS, TransformerConfig

__all__ = ["UNITS", "TransformerConfig", "VQSpec"]


class VQSpec(flax.struct.PyTreeNode):
    """The quantizer's information about a batch.

    loss_mask: [B, T], 1 where a position counts, 0 where it is padding. Padding moves no code and commits to none.
    n_positions: how many count in the complete batch, if this is a part of it; None: as many as in loss_mask.
    """

    loss_mask: jax.Array
    n_positions: jax.Array | None = None
