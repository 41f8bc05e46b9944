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
    """Which one it is and, where `auto` takes another than the fastest, why."""
    here = _of_mesh(mesh)
    kind = implementation(config, *here)
    if config.attention != "auto" or config.attn_type != "vq":
        return f"config.model.attention={kind}"
    reason = why_not(config, *here)
    if not here[0].startswith("TPU"):
        reason = f"the kernels of pallas are for TPUs, and this is {here[0]}"
    return f"config.model.attention=auto takes {kind}" + (f", since {reason}" if kind != "pallas" else f" on {here[0]}")


def _of_mesh(mesh: jax.sharding.Mesh) -> tuple[str, int, int]:
    """The kind of device, and the sizes of `model` and `sequence`."""
    shape = sizes(mesh)
    return mesh.devices.flat[0].device_kind, shape["model"], shape["sequence"]
