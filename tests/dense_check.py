"""Plan's cost model against a published measurement: `python -m tests.dense_check` (about a minute).

MaxText publishes 61.1% MFU for its 16B model on one slice of 256 v5e chips (the table "TPU v5e" of
https://github.com/AI-Hypercomputer/maxtext/blob/28816574b92f18c68fc21b127458b898cad9bc25/README.md; dimensions: at that
commit MaxText/configs/v5e/16b.sh and MaxText/configs/base.yml at a global_parameter_scale of 16). Two of its 32 layers
are compiled here for v5e:4x4 by the code that plans our own steps: same widths, rows and length for each chip, weights
split over all chips, each layer computed again in the backward pass, Adam. The attention core, embeddings and logits
are left out, so that what remains are large matmuls. What a chip computes for a layer does not depend on the number of
chips; time that chips wait for each other is in the measurement and not in the prediction.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tvq_pod.planning.cost import cost_of, topology_devices

MEASURED_MFU = 0.611


@dataclasses.dataclass(frozen=True)
class Dense:
    """A transformer's layers without the attention core: D the width, H the heads' widths together, F the MLP's."""

    d: int = 5120
    h: int = 32 * 256
    f: int = 32768
    n_layer: int = 2
    rows_per_chip: int = 6
    length: int = 2048

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weights of all layers, by name."""
        n, d, h, f = self.n_layer, self.d, self.h, self.f
        return dict(q=(n, d, h), k=(n, d, h), v=(n, d, h), o=(n, h, d), up=(n, d, f), down=(n, f, d), norms=(n, 2, d))

    @property
    def flops_per_token(self) -> int:
        """Of the matmuls, forward and backward; what is computed again is not counted again."""
        return 6 * sum(int(np.prod(shape)) for name, shape in self.shapes.items() if name != "norms")


def loss(weights: dict[str, jax.Array], x_rtd: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """Of float32 weights and bfloat16 activations [rows, length, D]: a number that depends on all of them."""

    @jax.checkpoint
    def layer(x, split):
        whole = {name: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())) for name, w in split.items()}
        return jax.lax.with_sharding_constraint(_layer(x, whole), NamedSharding(mesh, P("chips"))), None

    last, _ = jax.lax.scan(layer, x_rtd, jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
    return jnp.mean(jnp.square(last.astype(jnp.float32)))


def _layer(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    normed = _normed(x, w["norms"][0])
    mixed = (normed @ w["q"]) * (normed @ w["k"]) + normed @ w["v"]  # instead of the core: no matmul, all three used
    x += mixed @ w["o"]
    return x + jax.nn.relu(_normed(x, w["norms"][1]) @ w["up"]) @ w["down"]


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-6).astype(x.dtype) * scale


def predicted_mfu(model: Dense, topology: str) -> tuple[float, float]:
    """By the compiler's estimate, and by the roofline."""
    chip, devices = topology_devices(topology, 1)
    assert chip is not None, "a TPU"
    mesh = jax.sharding.Mesh(np.array(devices), ("chips",))
    rows = NamedSharding(mesh, P("chips"))
    split = NamedSharding(mesh, P(None, None, "chips"))
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for name, shape in model.shapes.items()}
    x_rtd = jax.ShapeDtypeStruct(
        (model.rows_per_chip * len(devices), model.length, model.d), jnp.bfloat16, sharding=rows
    )
    optimizer = optax.adam(1e-3)

    def step(weights, state, x_rtd):
        grads = jax.grad(loss)(weights, x_rtd, mesh)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state

    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=split if leaf.ndim else NamedSharding(mesh, P())
        ),
        jax.eval_shape(optimizer.init, weights),
    )
    cost = cost_of(jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, x_rtd).compile(), chip)
    flops = model.flops_per_token * model.rows_per_chip * model.length  # of a chip
    estimate, roofline = (
        flops / (cycles / chip.clock_hz) / chip.peak_flops for cycles in (cost.program.cycles(), cost.roofline.cycles)
    )
    return estimate, roofline


def main() -> None:
    """Prints both predictions and the measurement."""
    jax.config.update("jax_platforms", "cpu")
    estimate, roofline = predicted_mfu(Dense(), "v5e:4x4")
    print(f"measured MFU {MEASURED_MFU:.1%}, the compiler's estimate {estimate:.1%}, roofline {roofline:.1%}")


if __name__ == "__main__":
    main()
