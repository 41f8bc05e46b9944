"""A rolling digest of all tokens that a run has consumed, computed on the devices: the same on every mesh, and in every
run that read the same tokens in the same order.

It is not a cryptographic hash; it shows whether two runs consumed the same data.
"""

import jax
import jax.numpy as jnp

from tvq_pod.nn.mix import MURMUR3, mixed

SEEDS = (0x9E3779B1, 0x85EBCA77)  # one for each of two 32-bit halves


def start() -> jax.Array:
    """Returns the digest of a run that has consumed nothing: uint32 [2]."""
    return jnp.zeros(2, jnp.uint32)


def roll(digest: jax.Array, batch: dict) -> jax.Array:
    """Returns the digest after one more batch (see `Feed.batches`); it covers targets and document ids.

    Each token is hashed with its place in the batch; sums of integers do not depend on how the batch is sharded.
    """
    rows = jax.lax.broadcasted_iota(jnp.uint32, batch["targets"].shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.uint32, batch["targets"].shape, 1)
    place = rows * jnp.uint32(0x01000193) + columns
    tokens = batch["targets"].astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D) + batch["doc_ids"].astype(jnp.uint32)
    places = [mixed(place + jnp.uint32(seed), MURMUR3) for seed in SEEDS]
    sums = [jnp.sum(mixed(tokens ^ place, MURMUR3), dtype=jnp.uint32) for place in places]
    return mixed(digest * jnp.uint32(0x27D4EB2F) + jnp.stack(sums), MURMUR3)


def as_text(digest) -> str:
    """Returns the digest as 16 hexadecimal digits."""
    high, low = (int(half) for half in digest)
    return f"{high:08x}{low:08x}"
