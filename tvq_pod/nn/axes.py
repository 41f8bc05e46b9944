"""Names of axes: modules name the axes of their arrays, and code with a mesh maps the names to devices.

Outside of `placed_by` there is one device, and names have no effect. The names: batch; blocks; token; residual (the
model's width, in activations); embed (the same axis, in parameters); heads (of queries); key_heads; key; value;
shared_value; hidden; vocab; codes (of codebooks); cached_codes (of states); window; layers; shards (of blocks); None.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax


class Placement:
    """The placement of arrays. This base class has one device."""

    def constrain(self, x: jax.Array, names: tuple) -> jax.Array:
        """Constrains x to the sharding that its axes' names imply."""
        return x

    def gather(self, kernel: jax.Array, names: tuple) -> jax.Array:
        """Gathers a parameter along the mesh axes that it is sharded over for storage alone."""
        return kernel

    def scatter(self, cotangent: jax.Array, names: tuple) -> jax.Array:
        """Scatters the gradient of `gather`'s result to the parameter's sharding."""
        return cotangent

    def n_shards(self, name: str) -> int:
        """The number of parts that axes of this name are split into."""
        return 1

    def over_blocks(self, function: Callable, in_axes, out_axes) -> Callable:
        """Maps function(*arguments, axis) over the shards of an update's blocks, each with its part of the arguments.
        axis: the mapped axis, None if there is one shard. in_axes, out_axes: trees of tuples of names."""
        return functools.partial(function, axis=None)

    def on_each_device(
        self, function: Callable[[dict], dict], axes: Callable[[str, jax.Array], tuple], are_sums: bool = False
    ) -> Callable[[dict], dict]:
        """Maps function(arrays) over the devices, each with its part of the arrays; arguments and results are dicts of
        arrays by name. axes(name, array): the names of the array's axes. Kernels need this because the compiler can't
        partition them.

        are_sums: the results are sums over the arguments. So if devices have different arguments, and a result is not
        sharded over these devices, their results are summed."""
        return function

    def device_kind(self) -> str:
        """JAX's device kind: cpu, TPU v5 lite."""
        return jax.devices()[0].device_kind


_HERE = Placement()
_placement: contextvars.ContextVar[Placement] = contextvars.ContextVar("placement")


@contextlib.contextmanager
def placed_by(placement: Placement) -> Iterator[None]:
    """Uses a placement for arrays within the block."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def placement() -> Placement:
    """The current placement."""
    return _placement.get(_HERE)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """See Placement."""
    return placement().constrain(x, names)


def gathered(kernel: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter as the layers use it. Its gradient is scattered to the parameter's sharding: so the sum over devices
    is one reduce-scatter, where the transpose of a plain constraint would be an all-reduce. On one device it is the
    parameter itself, and any transformation works."""
    return kernel if placement() is _HERE else _gathered(kernel, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(kernel, names):
    return placement().gather(kernel, names)


_gathered.defvjp(
    lambda kernel, names: (_gathered(kernel, names), None),
    lambda names, _, cotangent: (placement().scatter(cotangent, names),),
)
