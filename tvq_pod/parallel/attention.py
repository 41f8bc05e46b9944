"""Choosing the implementation of attention for a run on its mesh; see nn/pallas/fit.py."""

import dataclasses

import jax

from tvq_pod.config.model import TransformerConfig
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say, tell
from tvq_pod.nn import trial
from tvq_pod.nn.axes import placed_by
from tvq_pod.nn.pallas.fit import implementation, why_auto_takes_xla, why_not
from tvq_pod.parallel.mesh import sizes
from tvq_pod.parallel.processes import all_agree
from tvq_pod.parallel.sharding import OnMesh


def check_attention(config: TransformerConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if the config asks for kernels that the devices of the mesh can't run."""
    if config.attention != "pallas":
        return
    if reason := why_not(config, *_of_mesh(mesh)):
        raise UserError(f"config.model.attention=pallas: {reason}; give xla or auto")


def with_tried_attention(settings: Settings, mesh: jax.sharding.Mesh) -> Settings:
    """Returns the settings, with config.model.attention=xla if auto would take kernels that fail on these devices.

    All processes try the kernels, each on one device, and all continue alike. Raises what `check_attention` raises.
    """
    check_attention(settings.model, mesh)
    if settings.model.attention != "auto" or chosen(settings.model, mesh) != "pallas":
        return settings
    problem = _problem(settings.model)
    line = f"the kernels of config.model.attention=auto do not work on {_of_mesh(mesh)[0]}"
    if problem is not None:
        tell(f"process {jax.process_index()}: {line} ({problem})")
    if all_agree(problem is None):
        return settings
    say(f"{line}, at least for one process: all use xla")
    return dataclasses.replace(settings, model=settings.model.replace(attention="xla"))


def _problem(config: TransformerConfig) -> str | None:
    """Returns what is wrong with the kernels on this process's first device; None if they work."""
    try:
        excess = trial.largest_excess(config)
    except Exception as refused:  # any error of the compiler or the device: xla works without the kernels
        return f"{type(refused).__name__}: {' '.join(str(refused).split())[:200]}"
    return None if excess <= trial.TOLERANCE else f"one of their results is off by {excess:.0%}"


def chosen(config: TransformerConfig, mesh: jax.sharding.Mesh) -> str:
    """Returns the implementation that computes attention of attn_type vq on the mesh."""
    with placed_by(OnMesh(mesh, fsdp=False)):
        return implementation(config)


def attention_line(config: TransformerConfig, mesh: jax.sharding.Mesh) -> str:
    """Returns a line that names the implementation and, for `auto` without the kernels, the reason."""
    if config.attention != "auto" or config.attn_type != "vq":
        return f"config.model.attention={chosen(config, mesh)}"
    device_kind, n_model = _of_mesh(mesh)
    if reason := why_auto_takes_xla(config, device_kind, n_model):
        return f"config.model.attention=auto uses xla, since {reason}"
    return f"config.model.attention=auto uses pallas, whose kernels fit {device_kind}"


def _of_mesh(mesh: jax.sharding.Mesh) -> tuple[str, int]:
    """Returns the kind of device, and the size of `model`."""
    return OnMesh(mesh, fsdp=False).device_kind(), sizes(mesh)["model"]
