"""The mapping from logical axis names, which nn gives to parameters, states and activations, to mesh axes."""

import functools
import itertools
import math

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvq_pod.nn.axes import Placement
from tvq_pod.parallel.deadlines import waiting

# A name that maps to () is not split. An axis whose size doesn't divide, or whose mesh axis is taken by an earlier
# axis, is not split either: with several heads the heads are split, with one head the width of its values.
RULES: dict[str, tuple[str, ...]] = dict(
    batch=("slice", "data", "data_inner"),
    heads=("model",),
    key_heads=("model",),
    value=("model",),
    hidden=("model",),
    vocab=("model",),
    cached_codes=("sequence",),
    tokens=("sequence",),  # of an update
    blocks=("sequence",),
    shards=("sequence",),  # one entry for each device's blocks
    **dict.fromkeys(("layers", "token", "residual", "embed", "key", "shared_value", "codes", "window"), ()),
)
# Parameters and optimizer state are also split over these, as in FSDP; the layers gather them for use.
STORAGE = ("data", "data_inner", "sequence")
ROWS, LANES = 16, 128  # a TPU's tile of bfloat16: the last axis but one, and the last

BATCH_AXES = ("batch", "tokens")


def spec_of(names: tuple, shape: tuple[int, ...], mesh: Mesh, stages: int | None = 0) -> PartitionSpec:
    """Returns the spec of an array whose axes have these logical names. Raises KeyError on a name that RULES lacks.

    stages: for a parameter, the number of its storage axes over which it is split, too; None: all. See `_stored`.
    """
    spec: list[tuple[str, ...]] = [()] * len(shape)
    taken: set[str] = set()
    for axis, name in enumerate(names):
        wanted = RULES[name] if name else ()
        if not taken & set(wanted) and shape[axis] % math.prod(mesh.shape[n] for n in wanted) == 0:
            spec[axis] = wanted
            taken |= set(wanted)
    if stages != 0:
        left = [size // math.prod(mesh.shape[n] for n in own) for size, own in zip(shape, spec, strict=True)]
        axis, storage = _stored(names, left, mesh)
        if storage:
            spec[axis] = (*spec[axis], *storage[:stages])
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in spec))


def _stored(names: tuple, left: list[int], mesh: Mesh) -> tuple[int, tuple[str, ...]]:
    """Returns the axis of a parameter that is split for storage, and the axes of STORAGE that it is split over: the
    most devices that divide an axis, and then the first axis that leaves each device complete tiles, so that it is
    gathered without a copy, or else the longest. left: the axes' sizes on each device."""
    choices = [axes for n in range(len(STORAGE), 0, -1) for axes in itertools.combinations(STORAGE, n)]
    for storage in sorted(choices, key=lambda axes: -math.prod(mesh.shape[n] for n in axes)):
        n_parts = math.prod(mesh.shape[n] for n in storage)
        if n_parts == 1:
            break
        able = [axis for axis, name in enumerate(names) if name != "layers" and left[axis] % n_parts == 0]
        tiles = [axis for axis in able if left[axis] // n_parts % _tile(axis, len(left)) == 0]
        for axis in tiles[:1] or sorted(able, key=lambda axis: -left[axis])[:1]:
            return axis, storage
    return 0, ()


def _tile(axis: int, n_axes: int) -> int:
    return {n_axes - 1: LANES, n_axes - 2: ROWS}.get(axis, 1)


def sharding_of(names: tuple, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding with the spec of `spec_of`."""
    return NamedSharding(mesh, spec_of(names, shape, mesh))


def shardings_of(axes, shapes, mesh: Mesh):
    """Maps `sharding_of` over two trees: tuples of names, and arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda names, x: sharding_of(names, x.shape, mesh), axes, shapes, is_leaf=_is_names)


def param_shardings(boxed_params, mesh: Mesh, fsdp: bool):
    """Returns the shardings of parameters that are still in boxes with their axes' names (flax's LogicallyPartitioned).

    fsdp: whether parameters with an "embed" axis are split over STORAGE; vectors and codebooks are too small for that.
    """

    def sharding(box):
        stages = None if fsdp and "embed" in box.names else 0
        return NamedSharding(mesh, spec_of(box.names, box.value.shape, mesh, stages))

    return jax.tree.map(sharding, boxed_params, is_leaf=_is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [B, T]: rows over slices and data, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in BATCH_AXES)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def on_one_device(params, mesh: Mesh):
    """Returns complete parameters on this process's first device. All processes gather them together."""
    if jax.process_count() == 1:
        return jax.device_put(params, jax.local_devices()[0])
    with waiting("gathering the parameters"):
        whole = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=replicated(mesh))(params))
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


class OnMesh(Placement):
    """The placement of arrays on a mesh, by RULES."""

    def __init__(self, mesh: Mesh, fsdp: bool):
        self._mesh, self._fsdp = mesh, fsdp

    def constrain(self, x, names):
        return self._constrain(x, spec_of(names, x.shape, self._mesh))

    def gather(self, kernel, names):
        for stages in (1, 0) if self._fsdp else (0,):
            kernel = self._constrain(kernel, spec_of(names, kernel.shape, self._mesh, stages))
        return kernel

    def scatter(self, cotangent, names):
        return self._constrain(cotangent, spec_of(names, cotangent.shape, self._mesh, None if self._fsdp else 0))

    def _constrain(self, x, spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, spec))

    def n_shards(self, name):
        return math.prod(self._mesh.shape[axis] for axis in RULES[name])

    def over_blocks(self, function, in_axes, out_axes):
        if self.n_shards("blocks") == 1:
            return super().over_blocks(function, in_axes, out_axes)
        (axis,) = RULES["blocks"]

        def mapped(*args):
            own = functools.partial(function, axis=axis)
            in_specs = self._specs(in_axes, args)
            out_specs = self._specs(out_axes, jax.eval_shape(functools.partial(function, axis=None), *args))
            return jax.shard_map(own, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs)(*args)

        return mapped

    def on_each_device(self, function, axes, are_sums=False):
        def mapped(arrays):
            made = jax.eval_shape(function, arrays)
            in_specs, out_specs = (
                self._specs({n: axes(n, array) for n, array in x.items()}, x) for x in (arrays, made)
            )
            given = set().union(*map(_mesh_axes, in_specs.values()))

            def of_device(arrays):
                made = function(arrays)
                shared = {name: tuple(given - _mesh_axes(out_specs[name])) for name in made} if are_sums else {}
                return made | {name: jax.lax.psum(made[name], over) for name, over in shared.items() if over}

            return jax.shard_map(
                of_device, mesh=self._mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=False
            )(arrays)  # fmt: skip

        return mapped

    def device_kind(self):
        return self._mesh.devices.flat[0].device_kind

    def _specs(self, axes, shapes):
        return jax.tree.map(lambda names, x: spec_of(names, x.shape, self._mesh), axes, shapes, is_leaf=_is_names)


def _mesh_axes(spec: PartitionSpec) -> set[str]:
    """Returns the mesh axes that some axis of an array is split over."""
    return {axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else axes or ())}


def _is_names(x) -> bool:
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def _is_box(x) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)
