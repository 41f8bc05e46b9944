"""Small building blocks that several modules share: sinusoids, dropout, projections, normalization."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.axes import constrain, gathered
from tvq_pod.nn.mix import LOWBIAS32, mixed
from tvq_pod.nn.scores import as_last_axes
from tvq_pod.nn.types import TransformerConfig

MAX_WAVELENGTH = 100_000.0


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """Sine and cosine features (Vaswani et al., arXiv 1706.03762, section 3.5), wavelengths 2 pi .. 2 pi * 1e5.

    positions: any shape, integers. Returns float32 [..., width]; an odd last feature is 0.
    """
    half = width // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1)
    positions = positions.astype(jnp.float32)[..., None]
    angles = positions * as_last_axes(MAX_WAVELENGTH**-exponents, positions)
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(features, [(0, 0)] * (features.ndim - 1) + [(0, width - 2 * half)])


def with_names(initializer: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """An initializer whose array is boxed with the logical names of its axes (see axes.py). `Module.param` unboxes it,
    so the module sees an array; `init` returns it boxed."""
    return cast(nn.initializers.Initializer, nn.with_logical_partitioning(initializer, names))


class Dropout(nn.Module):
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate), in training.

    Random bits are a hash of (key, index of the element) by the 32-bit mixer lowbias32 (see mix.py). JAX's threefry
    takes much more arithmetic, which is noticeable on the vector unit of a TPU: see docs/attention.md. As with
    threefry, the mask depends only on the key and on indices in the global array, so it is the same on any mesh.
    """

    rate: float
    rng_collection: str
    is_train: bool
    per_stream: bool = False  # one draw for each row of x [R, B, L, D]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.is_train or self.rate == 0.0:
            return x
        shape = (1, x.shape[1], 1, 1) if self.per_stream else x.shape
        bits = random_bits(self.make_rng(self.rng_collection), shape)
        keep = bits >= np.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x / np.asarray(1.0 - self.rate, x.dtype), jnp.zeros([], x.dtype))


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 numbers; see `Dropout`.

    The last two axes and those before them are indexed separately, each with fewer than 2 ** 32 elements: a pod's
    global batch has more elements than that.
    """
    first, second = jax.random.bits(key, [2])
    n_outer = max(len(shape) - 2, 0)
    outer, inner = _index(shape, range(n_outer)), _index(shape, range(n_outer, len(shape)))
    return mixed(mixed(inner ^ first, LOWBIAS32) + mixed(outer ^ second, LOWBIAS32), LOWBIAS32)


def _index(shape: tuple[int, ...], axes: range) -> jax.Array:
    """Each element's index within some neighboring axes, uint32; other axes have size 1."""
    own = tuple(n if axis in axes else 1 for axis, n in enumerate(shape))
    index, stride = jnp.zeros(own, jnp.uint32), 1
    for axis in reversed(axes):
        index += jax.lax.broadcasted_iota(jnp.uint32, own, axis) * np.uint32(stride)
        stride *= shape[axis]
    return index


class HeadProjection(nn.Module):
    """Projects x [..., T, D] to [..., H, T, width], where H is `n_head`; without a bias.

    Its kernel is [H, width, D]. A TPU lays out the last two axes in tiles, so neither should be of size 1; and with D
    last the gradient, a matmul, has the layout of the kernel and of the optimizer's arrays: no copies.
    """

    config: TransformerConfig
    n_head: int
    width: int
    names: tuple[str | None, str]  # of the axes H and width

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=2, out_axis=1, batch_axis=0)
        heads, width = self.names
        names = (heads, width, "embed")
        shape = (self.n_head, self.width, self.config.d_model)
        kernel = self.param("kernel", with_names(init, *names), shape, self.config.param_dtype)
        kernel = gathered(kernel.astype(self.config.dtype), names)
        y = jnp.swapaxes(jnp.tensordot(x, kernel, axes=[[-1], [2]]), -3, -2)
        blocks = ("blocks", "batch") if y.ndim == 5 else ()
        return constrain(y, *blocks, heads, "token", width)


class OutputProjection(nn.Module):
    """Projects a unit's output, [R, B, H, L, width], to the residual stream, [R, B, L, D]; has residual dropout and
    LayerDrop."""

    config: TransformerConfig
    names: tuple[str | None, str]  # of H and width

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, (_, _, n_head, _, width) = self.config, x.shape
        # fan-in over heads and their width; the residual stream is a sum of 2 n_layer units
        init = nn.initializers.variance_scaling(0.5 / c.n_layer, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        names = (*self.names, "embed")
        kernel = self.param("kernel", with_names(init, *names), (n_head, width, c.d_model), c.param_dtype)
        y = jnp.einsum("rbhlw,hwd->rbld", x, gathered(kernel.astype(c.dtype), names))
        y = constrain(y, "blocks", "batch", "token", "residual")
        y = Dropout(c.p_dropres, "ephemeral", c.is_train)(y)
        return Dropout(c.p_droplyr, "timeless", c.is_train, per_stream=True)(y)


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x^2) + 1e-6) over the last axis, in float32, times a gain `scale` if there is one."""

    config: TransformerConfig
    use_scale: bool

    @nn.compact
    def __call__(self, x: jax.Array, inverse: jax.Array | None = None) -> jax.Array:
        """Normalizes x. inverse: `inverse_rms` of x, if already computed."""
        y = x * (checkpoint_name(inverse_rms(x), "projected") if inverse is None else _known_inverse_rms(x, inverse))
        if self.use_scale:
            init = with_names(nn.initializers.ones, "residual")
            scale = self.param("scale", init, x.shape[-1:], self.config.param_dtype)
            y *= as_last_axes(scale, y)
        return y.astype(self.config.dtype)


def inverse_rms(x: jax.Array) -> jax.Array:
    """Computes 1 / sqrt(mean(x^2) + 1e-6) over the last axis, float32 [..., 1]."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-6)


@jax.custom_vjp
def _known_inverse_rms(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns `inverse`, which is `inverse_rms` of x, so that its gradient goes to x."""
    return inverse


def _known_inverse_rms_backward(kept, cotangent):
    x, inverse = kept
    slope = -cotangent * inverse**3 / x.shape[-1]
    return (slope * x.astype(jnp.float32)).astype(x.dtype), None


_known_inverse_rms.defvjp(lambda x, inverse: (inverse, (x, inverse)), _known_inverse_rms_backward)
