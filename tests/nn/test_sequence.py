"""What a shard of an update's tokens must know of those before it."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tvq_pod.nn.sequence import LANES, exclusive_scan

N_SHARDS, N_ROWS, N_HEAD, N_CODE = 4, 2, 3, 8


def in_turn(first, totals, keeps):
    """The recurrence, one shard after the other: before each of them, and after the last."""
    found = [first]
    for total, keep in zip(totals, keeps, strict=True):
        found.append(np.where(keep.reshape(-1, *[1] * (first.ndim - 1)), found[-1], 0.0) + total)
    return np.stack(found[:-1]), found[-1]


@pytest.mark.parametrize("width", [(), (3,), (LANES * N_SHARDS // N_CODE,)], ids=str)
def test_the_scan_over_shards_is_the_recurrence(eight_devices, width):
    """Counts, sums whose parts fill no row of lanes, and sums whose parts do."""
    rng = np.random.default_rng(0)
    shape = N_ROWS, N_HEAD, N_CODE, *width
    first, totals = rng.normal(size=shape).astype(np.float32), rng.normal(size=(N_SHARDS, *shape)).astype(np.float32)
    keeps = rng.random((N_SHARDS, N_ROWS)) < 0.6
    assert 0 < keeps.sum() < keeps.size
    mesh = jax.make_mesh((N_SHARDS,), ("axis",), (AxisType.Auto,), devices=eight_devices[:N_SHARDS])

    def of_shard(first, totals, keeps):
        before, after = exclusive_scan(first, totals[0], keeps[0], "axis")
        return before[None], after

    by_shard, by_code = PartitionSpec("axis"), PartitionSpec(None, None, "axis")
    mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=(by_code, by_shard, by_shard), out_specs=(by_shard, by_code))
    for found, expected in zip(jax.jit(mapped)(first, totals, keeps), in_turn(first, totals, keeps), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
