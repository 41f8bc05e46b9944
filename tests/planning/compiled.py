"""Compiles small programs for TPUs and prints, as JSON, what plan's cost model says of each:
`python -m tests.planning.compiled`, in a process of its own, for libtpu reads its flags when it is loaded."""

import functools
import json
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from tvq_pod.planning.cost import cost_of, topology_devices

N = 512  # rows and columns of what a step of the kernels' grid multiplies


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    costs = functools.partial(costs_on, "v5e:2x2")
    square, wide = ((4096, 4096), jnp.bfloat16), ((8192, 8192), jnp.bfloat16)
    found = dict(
        matmul=costs(jnp.matmul, square, square),
        silu=costs(jax.nn.silu, wide),
        slices=costs(doubled_one_by_one, ((32, 1024, 4096), jnp.float32)),
        kernel=costs(kernel(8, 2), *operands(8)),
        kernel_16_steps=costs(kernel(16, 2), *operands(16)),
        kernel_4_turns=costs(kernel(8, 4), *operands(8)),
        kernel_once=costs(kernel(8, 2, once=True), *operands(8)),
        kernel_of_data=costs(kernel(8, None), *operands(8)),
        kernel_v5p=costs_on("v5p:2x2x1", kernel(8, 2), *operands(8)),
        kernel_v5p_parallel=costs_on("v5p:2x2x1", kernel(8, 2, semantics="parallel"), *operands(8)),
    )
    print(json.dumps(found))


def costs_on(topology: str, function, *shapes) -> dict:
    """The roofline of the whole program, and its dearest operation."""
    chip, devices = topology_devices(topology, 1)
    assert chip is not None, "a TPU"
    where = SingleDeviceSharding(devices[0])
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    cost = cost_of(jax.jit(function).lower(*given).compile(), chip)
    dearest = max(cost.roofline.operations, key=lambda operation: operation.times * operation.cycles)
    return dict(
        cycles=cost.roofline.cycles,
        estimate=cost.program.cycles(),
        hbm_bytes=cost.roofline.hbm_bytes,
        bundles=dearest.count.cycles if dearest.count else None,
        dearest_cycles=dearest.cycles,
        bound=dearest.bound,
        without_bundles=cost.roofline.without_bundles(),
    )


def doubled_one_by_one(stack: jax.Array) -> jax.Array:
    """By a loop that reads one at a time, and writes it to its place in a new stack."""
    return jax.lax.scan(lambda carry, one: (carry, jnp.sin(one) * 2), None, stack)[1]


def operands(steps: int) -> list:
    return [((1,), jnp.int32), ((steps * N, N), jnp.bfloat16), ((N, N), jnp.bfloat16)]


def kernel(
    steps: int, turns: int | None, once: bool = False, semantics: Literal["arbitrary", "parallel"] = "arbitrary"
):
    """A kernel with a grid of `steps`, in each of which it multiplies so often, or as often as its first operand says;
    in the first twice as often with `once`."""

    def body(count, x, w, out, total):
        def turn(_, carry):
            total[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)
            return carry

        total[...] = jnp.zeros_like(total)
        jax.lax.fori_loop(0, turns or count[0], turn, 0)
        if once:

            @pl.when(pl.program_id(0) == 0)
            def _():
                jax.lax.fori_loop(0, turns or 0, turn, 0)

        out[...] = total[...].astype(out.dtype)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[pl.BlockSpec((N, N), lambda n, count: (n, 0)), pl.BlockSpec((N, N), lambda n, count: (0, 0))],
            out_specs=pl.BlockSpec((N, N), lambda n, count: (n, 0)),
            scratch_shapes=[pltpu.VMEM((N, N), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((steps * N, N), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        name="kernel",
    )


if __name__ == "__main__":
    main()
