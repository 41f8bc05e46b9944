"""The kernels on several devices, in interpret mode: outputs, states and every gradient are those of the plain
implementation on one device, however rows, blocks, heads and columns of values are spread."""

import functools

import numpy as np
import pytest

from tests.nn.pallas_cases import BLOCK_LEN, N_ROWS, assert_equal, compiled, core_config, two_updates
from tvq_pod.config.settings import MeshSettings
from tvq_pod.nn.axes import placed_by
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.sharding import OnMesh

N_BLOCKS = 8
T = N_BLOCKS * BLOCK_LEN
SHARD = T // 4
PLACES = [  # of each row, where documents begin in two updates
    [[], []],
    [[SHARD], [2 * SHARD - 1, 2 * SHARD + 1]],  # at a shard's border, and around one
    [[3, SHARD + 2, T - 1], [T, T + SHARD]],  # at the last token, and at the first
    [[SHARD - BLOCK_LEN, 3 * SHARD - 1], [BLOCK_LEN + 1, T + BLOCK_LEN, T + 2 * SHARD + 3]],
]


def assert_same_as_alone(devices, mesh_sizes: dict, **changes):
    """On two updates, with documents cut at PLACES and at random."""
    config = core_config(**changes)
    mesh = make_mesh(MeshSettings(**mesh_sizes), devices[: np.prod(list(mesh_sizes.values()))])
    compiled_here = compiled.__wrapped__(config)

    @functools.wraps(compiled_here)
    def run(**given):
        with placed_by(OnMesh(mesh, fsdp=True)):
            return compiled_here(**given)

    rng = np.random.default_rng(0)
    at_random = [[rng.integers(1, 2 * T, rng.integers(4)).tolist() for _ in range(N_ROWS)] for _ in range(2)]
    for seed, borders in enumerate([*PLACES, *at_random]):
        for found, expected in two_updates(config, borders, seed, N_BLOCKS, run):
            assert_equal(found, expected)


def test_the_columns_of_one_heads_values_are_spread(eight_devices):
    assert_same_as_alone(eight_devices, dict(data=2, model=2), n_head=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (dict(data=1, model=2), dict(head_type="mha", n_head=3)),  # columns are spread, since heads can't be
        (dict(data=2, model=2), dict(head_type="mqa", n_head=4, window_bias=1.5)),  # all devices have the keys
        (dict(data=1, model=4), dict(n_head=1, agg_cache=False)),
    ],
    ids=str,
)
def test_heads_and_columns_are_spread(eight_devices, mesh, changes):
    assert_same_as_alone(eight_devices, mesh, **changes)


@pytest.mark.slow(3)
def test_the_blocks_of_an_update_are_spread(eight_devices):
    assert_same_as_alone(eight_devices, dict(data=1, sequence=4), n_head=1, n_code=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (dict(data=1, sequence=8), dict(n_head=1)),  # one block each
        (dict(data=2, sequence=2, model=2), dict(n_head=1)),
        (dict(data=1, sequence=2, model=2), dict(head_type="mqa", n_head=2)),
        (dict(data=1, sequence=2), dict(head_type="mha", agg_cache=False)),
        (dict(data=1, sequence=4), dict(n_head=1, grad_thru_cache=False)),
    ],
    ids=str,
)
def test_blocks_are_spread_with_rows_heads_and_columns(eight_devices, mesh, changes):
    assert_same_as_alone(eight_devices, mesh, n_code=8, **changes)
