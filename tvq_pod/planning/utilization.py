"""What a training run is measured by, on the devices that are there: chips, and model FLOPs utilization (MFU)."""

import dataclasses

import jax

from tvq_pod.config.settings import Settings
from tvq_pod.planning.chips import CHIPS, DEVICE_KINDS, Chip
from tvq_pod.planning.flops import train_flops


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """chips: how many there are; devices, where chips.py does not have their kind. seconds_at_peak: what the arithmetic
    of a training step (see `train_flops`) takes if all chips work at their peak; None where that is not known, as on a
    CPU. MFU is seconds_at_peak over the seconds that a step takes, as in the plan."""

    chips: float
    seconds_at_peak: float | None


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax's devices of this kind are, or are cores of; None if chips.py does not have it."""
    return next((CHIPS[name] for name, kind in DEVICE_KINDS.items() if kind == device_kind), None)


def yardstick(settings: Settings, mesh: jax.sharding.Mesh) -> Yardstick:
    """That of a run on a mesh, whose devices are of one kind."""
    chip, train = chip_of(mesh.devices.flat[0].device_kind), settings.train
    if chip is None:
        return Yardstick(mesh.size, None)
    chips = mesh.size / chip.devices
    flops = train_flops(settings.model, train.batch_size * train.update_len, train.update_len)
    return Yardstick(chips, flops / (chips * chip.peak_flops))
