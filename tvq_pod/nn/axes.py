"""Names of axes: modules say what the axes of their arrays are, and whoever knows a mesh says where that puts them.

Outside of `placed_by` there is one device, and names have no effect. The names: batch; blocks; token; residual (the
model's width, of activations); embed (the same axis, of parameters); heads (of queries); key_heads; key; value;
shared_value; hidden; vocab; codes (of codebooks); cached_codes (of states); window; layers; shards (of blocks);
None.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax


class Placement:
    """Says where arrays lie: here, on one device."""

    def constrain(self, x: jax.Array, names: tuple) -> jax.Array:
        """x, lying where the names of its axes say."""
        return x

    def gather(self, kernel: jax.Array, names: tuple) -> jax.Array:
        """A parameter, whole along what it is spread over for storage alone."""
        return kernel

    def scatter(self, cotangent: jax.Array, names: tuple) -> jax.Array:
        """The gradient of what `gather` returned, where the parameter lies."""
        return cotangent

    def n_shards(self, name: str) -> int:
        """Parts that axes of this name are split into."""
        return 1

    def over_blocks(self, function: Callable, in_axes, out_axes) -> Callable:
        """function(*arguments, axis), on every shard of an update's blocks with its part of the arguments. axis: the
        mapped axis, None if there is one shard. in_axes, out_axes: trees of tuples of names."""
        return functools.partial(function, axis=None)

    def on_each_device(
        self, function: Callable[[dict], dict], axes: Callable[[str, jax.Array], tuple], are_sums: bool = False
    ) -> Callable[[dict], dict]:
        """function(arrays), on every device with its part of them; both dicts of arrays by name. axes(name, array): the
        names of the array's axes. Only the compiler looks into a function elsewhere; a kernel it can't divide.

        are_sums: what the function returns is a sum over all that it was given. So where devices have different
        arguments, and a result is not spread over those devices, theirs are summed."""
        return function

    def device_kind(self) -> str:
        """What the devices are, in JAX's words: cpu, TPU v5 lite."""
        return jax.devices()[0].device_kind


_HERE = Placement()
_placement: contextvars.ContextVar[Placement] = contextvars.ContextVar("placement")


@contextlib.contextmanager
def placed_by(placement: Placement) -> Iterator[None]:
    """Within, arrays lie where this says."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def placement() -> Placement:
    """Today's."""
    return _placement.get(_HERE)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """See Placement."""
    return placement().constrain(x, names)


def gathered(kernel: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter as the layers use it. Its gradient goes back to where it lies part by part: so devices' sums are one
    reduce-scatter, where the transpose of a mere constraint would be an all-reduce. On one device it is the parameter
    itself, and any transformation goes through."""
    return kernel if placement() is _HERE else _gathered(kernel, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(kernel, names):
    return placement().gather(kernel, names)


_gathered.defvjp(
    lambda kernel, names: (_gathered(kernel, names), None),
    lambda names, _, cotangent: (placement().scatter(cotangent, names),),
)
