"""The one table from logical axis names, which nn gives to parameters, states and activations, to mesh axes."""

import functools
import math

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvq_pod.nn.axes import Placement

# A name that maps to () is not split. An axis whose size doesn't divide, and one that meets a mesh axis taken by an
# axis before it, is not split either: with several heads the heads are, with one head the width of its values.
RULES = dict(
    batch=("slice", "data"),
    embed=("data",),  # of parameters: gathered for use, layer by layer
    heads=("model",),
    key_heads=("model",),
    value=("model",),
    hidden=("model",),
    vocab=("model",),
    cached_codes=("sequence",),
    tokens=("sequence",),  # of an update
    blocks=("sequence",),
    **dict.fromkeys(("layers", "token", "residual", "key", "shared_value", "codes", "window"), ()),
)


BATCH_AXES = ("batch", "tokens")


def spec_of(names: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where an array of this shape lies whose axes have these logical names. Raises KeyError on a name that RULES lacks.

    A parameter whose "embed" axis doesn't divide is spread over another of its axes, the largest that does.
    """
    spec, taken = [()] * len(shape), set()

    def take(axis: int, mesh_axes: tuple) -> bool:
        size = 1
        for name in (*spec[axis], *mesh_axes):
            size *= mesh.shape[name]
        if taken & set(mesh_axes) or not mesh_axes or shape[axis] % size:
            return False
        spec[axis] = (*spec[axis], *mesh_axes)
        taken.update(mesh_axes)
        return True

    for axis, name in enumerate(names):
        take(axis, RULES[name] if name else ())
    if "embed" in names and not taken & set(RULES["embed"]):
        others = [axis for axis, name in enumerate(names) if name != "layers"]
        any(take(axis, RULES["embed"]) for axis in sorted(others, key=lambda axis: -shape[axis]))
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in spec))


def sharding_of(names: tuple, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """See `spec_of`."""
    return NamedSharding(mesh, spec_of(names, shape, mesh))


def shardings_of(axes, shapes, mesh: Mesh):
    """`sharding_of` over two trees: tuples of names, and arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda names, x: sharding_of(names, x.shape, mesh), axes, shapes, is_leaf=_is_names)


def param_shardings(boxed_params, mesh: Mesh):
    """Shardings of parameters that are still in the boxes with their axes' names (flax's LogicallyPartitioned)."""
    names = jax.tree.map(lambda box: box.names, boxed_params, is_leaf=_is_box)
    return shardings_of(names, nn.meta.unbox(boxed_params), mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]: rows over slices and data, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in BATCH_AXES)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, PartitionSpec())


class OnMesh(Placement):
    """Arrays lie on a mesh, by RULES."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def constrain(self, x, names):
        return jax.lax.with_sharding_constraint(x, sharding_of(names, x.shape, self._mesh))

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

    def _specs(self, axes, shapes):
        return jax.tree.map(lambda names, x: spec_of(names, x.shape, self._mesh), axes, shapes, is_leaf=_is_names)


def _is_names(x) -> bool:
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def _is_box(x) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)
