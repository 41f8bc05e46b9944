"""Which implementation of attention a run takes on its mesh, said at the start; see nn/pallas/fit.py."""

import jax

from tvq_pod.config.model import TransformerConfig
from tvq_pod.errors import UserError
from tvq_pod.nn.pallas.fit import implementation, why_not
from tvq_pod.parallel.mesh import sizes


def check_attention(config: TransformerConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if the config wants kernels that the devices of the mesh can't run."""
    if config.attention != "pallas":
        return
    if reason := why_not(config, *_of_mesh(mesh)):
        raise UserError(f"config.model.attention=pallas: {reason}; give xla or auto")


def attention_line(config: TransformerConfig, mesh: jax.sharding.Mesh) -> str:
    """Which one it is and, for `auto` on TPUs, whether the kernels could be used."""
    device_kind, n_model = _of_mesh(mesh)
    kind = implementation(config)
    if config.attention != "auto" or config.attn_type != "vq":
        return f"config.model.attention={kind}"
    if not device_kind.startswith("TPU"):
        return f"config.model.attention=auto takes {kind}"
    reason = why_not(config, device_kind, n_model)
    return f"config.model.attention=auto takes {kind}; pallas " + (f"does not fit: {reason}" if reason else "fits, too")


def _of_mesh(mesh: jax.sharding.Mesh) -> tuple[str, int]:
    """The kind of device, and the size of `model`."""
    return mesh.devices.flat[0].device_kind, sizes(mesh)["model"]
