"""The two frozen records that every layer is given: what the model is, and which positions count."""

import flax.struct
import jax

from tvq_pod.config.model import UNITS, TransformerConfig

__all__ = ["UNITS", "TransformerConfig", "VQSpec"]


class VQSpec(flax.struct.PyTreeNode):
    """What the quantizer must know of a batch.

    loss_mask: [B, T], 1 where a position counts, 0 where it is padding. Padding moves no code and commits to none.
    n_positions: how many count in the complete batch, where this is a part of it; None: as many as loss_mask has.
    """

    loss_mask: jax.Array
    n_positions: jax.Array | None = None
