"""The mesh: which devices, along which named axes."""

import jax
import numpy as np

from tvq_pod.config import MeshSettings
from tvq_pod.errors import UserError

AXES = ("data", "sequence", "model")


def make_mesh(settings: MeshSettings, devices: list | None = None) -> jax.sharding.Mesh:
    """A mesh of all devices (of every process) with axes data, sequence and model.

    Its axes are Auto: the compiler spreads what no sharding was given for. Raises UserError if the sizes don't multiply
    to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    rest = settings.sequence * settings.model * settings.slices
    data = len(devices) // rest if settings.data == -1 else settings.data
    if data * rest != len(devices) or data < 1:
        raise UserError(
            f"config.mesh.data={settings.data}: with sequence={settings.sequence}, model={settings.model}, "
            f"slices={settings.slices} the mesh must have {len(devices)} devices, as there are; "
            f"give {max(1, len(devices) // rest)}, or -1"
        )
    shape = (data, settings.sequence, settings.model)
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES)
