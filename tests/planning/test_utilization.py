"""MFU while training is that of the plan: the same arithmetic, the same table of chips."""

import types

import numpy as np
import pytest

from tvq_pod.config.settings import Settings
from tvq_pod.planning.chips import CHIPS, DEVICE_KINDS
from tvq_pod.planning.flops import train_flops
from tvq_pod.planning.utilization import chip_of, yardstick


def mesh_of(kind, n_devices):
    devices = np.array([types.SimpleNamespace(device_kind=kind)] * n_devices)
    return types.SimpleNamespace(devices=devices, size=n_devices)


def test_every_chip_is_known_by_what_jax_calls_its_devices():
    assert set(DEVICE_KINDS) == set(CHIPS)
    assert [chip_of(kind) for kind in DEVICE_KINDS.values()] == [CHIPS[name] for name in DEVICE_KINDS]
    assert chip_of("cpu") is chip_of("NVIDIA H100 80GB HBM3") is None


@pytest.mark.parametrize(("kind", "n_devices", "chips"), [("TPU v5 lite", 8, 8), ("TPU v3", 8, 4), ("TPU7x", 2, 1)])
def test_a_step_at_the_peak_takes_its_arithmetic_over_that_of_all_chips(kind, n_devices, chips):
    settings, chip = Settings(), chip_of(kind)
    assert chip is not None
    found = yardstick(settings, mesh_of(kind, n_devices))
    assert found.chips == chips
    flops = train_flops(settings.model, 8 * 512, 512)
    assert found.seconds_at_peak == pytest.approx(flops / chips / chip.peak_flops)


def test_devices_that_are_not_in_the_table_have_no_mfu():
    found = yardstick(Settings(), mesh_of("cpu", 8))
    assert (found.chips, found.seconds_at_peak) == (8, None)
