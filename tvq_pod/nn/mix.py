"""The hash of 32-bit integers for dropout masks and for the digest of consumed tokens.

Both use one function with different constants. The masks of a resumed run, and the digest in a checkpoint, depend on
these constants: they must never change.
"""

import jax
import numpy as np

# Rounds of (shift, odd multiplier). lowbias32: C. Wellons, Prospecting for hash functions, 2018.
LOWBIAS32 = ((16, 0x7FEB352D), (15, 0x846CA68B))
# The finalizer of MurmurHash3: A. Appleby, 2011.
MURMUR3 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))


def mixed(x: jax.Array, rounds: tuple[tuple[int, int], ...]) -> jax.Array:
    """A bijection of uint32, element by element, in which each bit of the input flips each bit of the output for
    about half of all inputs.

    x: uint32, of any shape; so is the result. rounds: LOWBIAS32 or MURMUR3. For each round
    x <- (x ^ (x >> shift)) * multiplier mod 2^32, and last x ^ (x >> 16). Not a cryptographic hash.
    """
    for shift, multiplier in rounds:
        x = (x ^ (x >> shift)) * np.uint32(multiplier)
    return x ^ (x >> 16)
