"""What both kinds of attention do with scores: hide what must not be seen, and place relative biases."""

import jax
import jax.numpy as jnp

NEVER = -1e30  # score of what must not be attended to; finite, so that no difference of two is NaN


def by_column(by_distance: jax.Array, mem_len: int) -> jax.Array:
    """Biases [..., L, M + 1] by distance 0 .. M -> [..., L, M + L] by column, 0 beyond that reach.

    Query a sees distance d at column M + a - d: each row is the reversed biases, shifted right by a. Laid flat with L
    zeros behind each row, and read again with rows one shorter, each row falls one further to the right.
    """
    *lead, block_len, _ = by_distance.shape
    width = mem_len + block_len
    rows = jnp.pad(by_distance[..., ::-1], [(0, 0)] * (len(lead) + 1) + [(0, block_len)])  # [..., L, width + 1]
    flat = rows.reshape(*lead, block_len * (width + 1))[..., : block_len * width]
    return flat.reshape(*lead, block_len, width)
