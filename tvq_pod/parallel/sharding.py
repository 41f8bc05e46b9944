"""The one table from logical axis names, which nn gives to parameters and states, to mesh axes."""

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A name that maps to None is not split: every device has all of it.
RULES = (
    ("batch", "data"),
    ("layers", None),
    ("embed", None),
    ("vocab", None),
    ("heads", None),
    ("key", None),
    ("value", None),
    ("codes", None),
    ("window", None),
)


def sharding_of(names: tuple, mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose axes have these logical names. Raises KeyError on a name that RULES lacks."""
    table = dict(RULES)
    return NamedSharding(mesh, PartitionSpec(*(table[name] for name in names)))


def shardings_of(axes, mesh: Mesh):
    """`sharding_of` over a tree whose leaves are tuples of names."""
    return jax.tree.map(lambda names: sharding_of(names, mesh), axes, is_leaf=lambda x: isinstance(x, tuple))


def param_shardings(boxed_params, mesh: Mesh):
    """Shardings of parameters that are still in the boxes with their axes' names (flax's LogicallyPartitioned)."""
    specs = nn.get_partition_spec(boxed_params)
    return jax.tree.map(
        lambda spec: sharding_of(tuple(spec), mesh), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis."""
    return sharding_of(("batch",), mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, PartitionSpec())
