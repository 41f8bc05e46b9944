"""The measures of a training run on this job's devices: chips, and model FLOPs utilization (MFU)."""

import dataclasses

import jax

from tvq_pod.config.settings import Settings
from tvq_pod.planning.chips import CHIPS, DEVICE_KINDS, Chip
from tvq_pod.planning.flops import train_flops


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """chips: their number, or that of the devices if chips.py does not have their kind. seconds_at_peak: the time of a
    training step's arithmetic (see `train_flops`) if all chips work at their peak; None if it is unknown, as on a CPU.
    MFU is seconds_at_peak over the seconds that a step takes, as in the plan."""

    chips: float
    seconds_at_peak: float | None


def chip_of(device_kind: str) -> Chip | None:
    """The chip of jax's devices of this kind, which may be its cores; None if chips.py does not have it."""
    return next((CHIPS[name] for name, kind in DEVICE_KINDS.items() if kind == device_kind), None)


def yardstick(settings: Settings, mesh: jax.sharding.Mesh) -> Yardstick:
    """The yardstick of a run on a mesh, whose devices are of one kind."""
    chip, train = chip_of(mesh.devices.flat[0].device_kind), settings.train
    if chip is None:
        return Yardstick(mesh.size, None)
    chips = mesh.size / chip.devices
    flops = train_flops(settings.model, train.batch_size * train.update_len, train.update_len)
    return Yardstick(chips, flops / (chips * chip.peak_flops))
