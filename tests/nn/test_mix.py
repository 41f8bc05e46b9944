"""The hash of 32-bit integers: what it is by its definition, and what makes it a good one."""

import jax.numpy as jnp
import numpy as np
import pytest

from tvq_pod.nn.mix import LOWBIAS32, MURMUR3, mixed

INPUTS = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)


def inverse(y: int, rounds) -> int:
    """The x that is mixed to y, in Python's integers of any size."""

    def unshifted(y: int, shift: int) -> int:  # solves x ^ (x >> shift) == y, from the highest bits down
        x = y
        for _ in range(32 // shift):
            x = y ^ (x >> shift)
        return x

    y = unshifted(y, 16)
    for shift, multiplier in reversed(rounds):
        y = unshifted(y * pow(multiplier, -1, 2**32) % 2**32, shift)
    return y


@pytest.mark.parametrize("rounds", [LOWBIAS32, MURMUR3])
def test_it_can_be_undone_so_no_two_inputs_meet(rounds):
    found = np.asarray(mixed(jnp.asarray(INPUTS), rounds))
    assert found.dtype == np.uint32
    assert [inverse(int(y), rounds) for y in found] == INPUTS.tolist()


def test_the_finalizer_of_murmur3_gives_its_published_values():
    assert np.asarray(mixed(jnp.asarray([0, 1], jnp.uint32), MURMUR3)).tolist() == [0, 0x514E28B7]


@pytest.mark.parametrize("rounds", [LOWBIAS32, MURMUR3])
def test_each_bit_of_the_input_flips_each_bit_of_the_output_for_half_of_all_inputs(rounds):
    flipped = INPUTS[:, None] ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))
    changed = np.asarray(mixed(jnp.asarray(INPUTS)[:, None], rounds) ^ mixed(jnp.asarray(flipped), rounds))
    share = np.mean(changed[..., None] >> np.arange(32, dtype=np.uint32) & 1, axis=0)  # [input bit, output bit]
    np.testing.assert_allclose(share, 0.5, atol=5 * 0.5 / np.sqrt(len(INPUTS)))
