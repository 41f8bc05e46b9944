"""A rolling digest of all tokens that a run has consumed, made on the devices: the same on every mesh, and in every run
that read the same tokens in the same order.

It is no cryptographic hash; it is there to show two runs' data to be the same, or not.
"""

import jax
import jax.numpy as jnp

SEEDS = (0x9E3779B1, 0x85EBCA77)  # one for each of two 32-bit halves


def start() -> jax.Array:
    """Of a run that has consumed nothing: uint32 [2]."""
    return jnp.zeros(2, jnp.uint32)


def roll(digest: jax.Array, batch: dict) -> jax.Array:
    """The digest after one more batch (see `Feed.batches`), of its targets and where documents begin.

    Each token is hashed with its place in the batch; sums of integers do not depend on how the batch lies on devices.
    """
    rows = jax.lax.broadcasted_iota(jnp.uint32, batch["targets"].shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.uint32, batch["targets"].shape, 1)
    place = rows * jnp.uint32(0x01000193) + columns
    tokens = batch["targets"].astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D) + batch["doc_ids"].astype(jnp.uint32)
    sums = [jnp.sum(_mixed(tokens ^ _mixed(place + jnp.uint32(seed))), dtype=jnp.uint32) for seed in SEEDS]
    return _mixed(digest * jnp.uint32(0x27D4EB2F) + jnp.stack(sums))


def as_text(digest) -> str:
    """16 hexadecimal digits."""
    high, low = (int(half) for half in digest)
    return f"{high:08x}{low:08x}"


def _mixed(x: jax.Array) -> jax.Array:
    """Each uint32 to another, all of whose bits depend on all of its own (a finalizer as in MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
