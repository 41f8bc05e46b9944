"""The mesh: the devices, arranged along named axes."""

import jax
import numpy as np
from jax.experimental import mesh_utils

from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.errors import UserError

AXES = ("slice", "data", "data_inner", "sequence", "model")  # from the slowest network to the fastest
AXES_MEAN = dict(
    slice="rows of the batch, over the network between slices",
    data="rows of the batch; parameters and optimizer state",
    sequence="the tokens of an update",
    model="heads, or the width of one head's values",
)


def make_mesh(settings: MeshSettings, devices: list | None = None) -> jax.sharding.Mesh:
    """Returns a mesh of all devices (of every process) with axes slice, data, sequence and model.

    Axes data, sequence and model are inside a slice, where the network is fast; model and sequence are on neighbors. If
    data spans all three dimensions of a torus, it is two axes, data and data_inner, since XLA:TPU gathers along at most
    two: along three it sums zero-padded arrays instead, which sends twice as much. Axes are Auto: the compiler shards
    arrays without a given sharding. Raises UserError if the sizes don't multiply to the number of devices, or the
    number of slices is wrong.
    """
    devices = jax.devices() if devices is None else devices
    slices = _by_slice(devices, settings.slices)
    rest = settings.sequence * settings.model
    data = len(slices[0]) // rest if settings.data == -1 else settings.data
    if data * rest != len(slices[0]) or data < 1:
        each = "" if settings.slices == 1 else f" in each of {settings.slices} slices"
        raise UserError(
            f"config.mesh.data={settings.data}: with sequence={settings.sequence}, model={settings.model} "
            f"the mesh must use all {len(slices[0])} device(s){each}; " + _advice(len(slices[0]), rest)
        )
    inner = _innermost(slices[0], data)
    shape = (data // inner, inner, settings.sequence, settings.model)
    meshes = [mesh_utils.create_device_mesh(shape, members, allow_split_physical_axes=True) for members in slices]
    return jax.sharding.Mesh(np.stack(meshes), AXES)


def _advice(n_devices: int, rest: int) -> str:
    if n_devices % rest:
        return f"sequence * model = {rest} must divide {n_devices}"
    return f"give {n_devices // rest}, or -1"


def _by_slice(devices: list, n_slices: int) -> list[list]:
    """Returns the devices of each slice. Simulated devices have no slices and are cut into equal parts."""
    by_index = {}
    for device in devices:
        by_index.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if len(by_index) == 1 and devices[0].platform == "cpu" and len(devices) % n_slices == 0:
        return np.asarray(devices).reshape(n_slices, -1).tolist()
    if len(by_index) != n_slices:
        simulated = devices[0].platform == "cpu"
        must = f"divide {len(devices)} devices" if simulated else f"be {len(by_index)}, the number of slices"
        raise UserError(f"config.mesh.slices={n_slices}: must {must}")
    return [by_index[index] for index in sorted(by_index)]


def _innermost(devices: list, data: int) -> int:
    """Returns the size of data_inner: the torus's shortest dimension if data spans all three, otherwise 1."""
    coords = np.array([getattr(device, "coords", (0,)) for device in devices])
    dimensions = np.ptp(coords, axis=0) + 1
    shortest = int(dimensions.min())
    if len(dimensions) == 3 and shortest >= 4 and data == np.prod(dimensions):
        return shortest
    return 1


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """Returns compiler options for jit. XLA:TPU may split a matmul with a gathered matrix into one for each of its
    parts, which overlap with the transfer of the next part. Ours are not large enough: compiled for v5e:4x4, enwik8
    takes 302 ms a step with it, 238 without."""
    if mesh.devices.flat[0].platform != "tpu":
        return None
    return dict(xla_jf_spmd_threshold_for_windowed_einsum_mib="1000000")


def named_axes(mesh: jax.sharding.Mesh) -> list[tuple[str, int]]:
    """Returns the axes' names, as in the config, and sizes, in the mesh's order; data appears twice."""
    return [(name.removesuffix("_inner"), size) for name, size in mesh.shape.items()]


def sizes(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Returns the sizes of the mesh, by the config's names."""
    totals = {}
    for name, size in named_axes(mesh):
        totals[name] = totals.get(name, 1) * size
    return totals


def n_row_shards(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of parts that rows are split into."""
    return mesh.shape["slice"] * sizes(mesh)["data"]


def check_rows(settings: Settings, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if the rows of a training step, or of an evaluation, can't be split evenly over the mesh."""
    check_divides("config.train.batch_size", settings.train.batch_size, mesh, settings.train.microbatches)
    if settings.eval.every_steps or settings.eval.at_end:
        check_divides("config.eval.batch_size", settings.eval.batch_size, mesh)  # 0 passes


def check_divides(name: str, value: int, mesh: jax.sharding.Mesh, microbatches: int = 1) -> None:
    """Raises UserError if a number of rows can't be split evenly over the mesh, in each of the microbatches."""
    n_shards = n_row_shards(mesh)
    least = n_shards * microbatches
    if value % least:
        slices = f" in {mesh.shape['slice']} slices" if mesh.shape["slice"] > 1 else ""
        parts = f" for each of {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(
            f"{name}={value}: must be a multiple of the {n_shards} devices of config.mesh.data{slices}{parts}, "
            f"for example {max(1, round(value / least)) * least}"
        )
