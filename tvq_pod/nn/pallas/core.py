"""The attention core for all blocks, by the kernels, with its gradient: attn.py calls it with `attention="pallas"`.

It does what attend.py, cache.py and scores.py do, and also computes the SiLU of values and gates. XLA computes the
small arrays (start.py). Gradients go to queries, u, v, keys, values, gates, the relative table and the state; reverse
mode only. The output and the logarithm of each query's sum are kept for the backward pass, which recomputes the caches.

Devices may share the rows, the blocks, the heads, and the columns of values. Each runs the kernels on its part.
Gradients of arrays that several of them use are sums over these devices.

Shapes: N shards of R blocks of L, B rows, H key heads, G query heads for each, M = L, S codes, K, V.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from tvq_pod.nn.axes import placement
from tvq_pod.nn.pallas.backward import SMALL_SUMS, backward, backward_operands
from tvq_pod.nn.pallas.fit import shape_of, sized
from tvq_pod.nn.pallas.forward import caches_again, caches_operands, forward, forward_operands
from tvq_pod.nn.pallas.start import start
from tvq_pod.nn.types import TransformerConfig

STATE = ("k_window", "v_window", "first_mean")
CONSTANT = (
    "codes", "positions", "sees_cache", "leaving", "kept", "log_counts", "inverse", "inverse_after", "first_count"
)  # fmt: skip
OF_SHARD = (*STATE, "first_count", "mean", "d_mean", *(f"{name}_gradient" for name in STATE))  # with a leading axis N


@functools.cache
def axes_of(value: str) -> dict[str, tuple]:
    """The names of the axes of the kernels' operands and results. value: the name of V."""
    rows, blocks = ("batch", "key_heads"), ("blocks", "batch", "key_heads")
    of_shard, queries = ("shards", *rows), (*blocks, "heads")
    k, v, gate = (*blocks, "token", "key"), (*blocks, "token", value), (*queries, "token", value)
    window, sums = (*of_shard, "window", value), (*of_shard, "codes", value)
    return dict(
        q=(*queries, "token", "key"),
        **dict.fromkeys(("u", "v_bias"), ("key_heads", "heads", None, "key")),
        k=k,
        v=v,
        **dict.fromkeys(("gate", "out", "gated", "d_out", "gate_gradient"), gate),
        **dict.fromkeys(("by_distance", "at_reach"), ("key_heads", None, "key")),
        **dict.fromkeys(("k_window", "k_window_gradient"), (*of_shard, "window", "key")),
        **dict.fromkeys(("v_window", "v_window_gradient"), window),
        **dict.fromkeys(("first_mean", "first_mean_gradient", "mean", "d_mean"), sums),
        codes=("key_heads", "codes", "key"),
        kept=("blocks", "batch"),
        layer=(None,),
        **dict.fromkeys(("positions", "sees_cache"), ("blocks", "batch", None, "token")),
        **dict.fromkeys(("log_counts", "inverse", "inverse_after"), (*blocks, None, "codes")),
        leaving=(*blocks, None, "token"),
        first_count=(*of_shard, None, "codes"),
        log_total=(*queries, None, "token"),
        means=(*blocks, "codes", value),
        q_gradient=(*queries, "token", "key"),
        k_gradient=k,
        v_gradient=v,
        by_distance_gradient=(*rows, None, "key"),
        small_sums=(*queries, None, None, "key"),
    )


def fused_attention(
    config: TransformerConfig, biases: dict, q, present: dict, gate: jax.Array | None, state: dict
) -> tuple[jax.Array, dict]:
    """Attends all blocks of an update.

    q: [N R, B, H, G, L, K]. present: z int32 [N R, B, H, L], k_hat [N R, B, H, L, K], v [N R, B, H, L, V], doc_ids
    int32 [N R, B, L]. gate: [N R, B, H, G, L, V], or None. With a gate, it and v are raw projections: values are
    silu(v), and the output is multiplied by silu(gate). biases: u and v [Q, K], r [H, M + 1, K], codes [H, S, K].
    state: as `VQAttention.initial_state` returns it.
    Returns [N R, B, H, G, L, V] in the dtype of q, and the state after the last block.
    """
    c = config.replace(block_len=q.shape[4])
    x, others, new_state = operands(c, biases, q, present, gate, state)
    out, mean = cast(tuple[jax.Array, jax.Array | None], _core(c, x, others))
    return out, with_mean(new_state, mean)


def operands(
    config: TransformerConfig,
    biases: dict,
    q,
    present: dict,
    gate: jax.Array | None,
    state: dict,
    stacked: dict | None = None,
) -> tuple[dict, dict, dict]:
    """The kernels' operands for the arguments of `fused_attention`, in which config.block_len is L: x, which always has
    a gradient; others: STATE, which has one on request, and CONSTANT, which never has one; and the next state, without
    the cache's mean if the kernels compute it. stacked: see `start`."""
    c, r = config, biases["r"]
    others, new_state = start(c, present, state, gate is not None, stacked)
    u, v_bias = (biases[name].reshape(*q.shape[2:4], 1, c.d_k) for name in ("u", "v"))
    x = dict(
        q=q,
        u=u,
        v_bias=v_bias,
        k=present["k_hat"],
        v=present["v"],
        by_distance=jnp.concatenate([r[:, :1], r[:, 1 : c.mem_len][:, ::-1]], axis=1),  # row m: distance -m mod L
        at_reach=r[:, c.mem_len :],
    )
    if gate is not None:
        x |= dict(gate=gate)
    return x, others | (dict(codes=biases["codes"]) if c.agg_cache else {}), new_state


def with_mean(new_state: dict, mean: jax.Array | None) -> dict:
    """The next state of `operands`, with the mean that the forward kernel returns; with several shards, start.py has
    computed the cache."""
    if mean is None or len(mean) > 1:
        return new_state
    return new_state | dict(aggcache=new_state["aggcache"] | dict(upper_div_lower=mean[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(config: TransformerConfig, x: dict, others: dict) -> tuple[jax.Array, jax.Array | None]:
    made = core_forward(config, x, others)
    return made["gated" if "gate" in x else "out"], made.get("mean")


def _forward(config, x, others):
    x = {name: primal.value for name, primal in x.items()}
    to_state = any(others[name].perturbed for name in STATE if name in others)
    others = {name: primal.value for name, primal in others.items()}
    made = core_forward(config, x, others)
    kept = dict(out=made["out"], log_total=made["log_total"])
    asked = ({},) if to_state else ()  # the leaves of what is kept must be arrays, so the structure has the answer
    return (made["gated" if "gate" in x else "out"], made.get("mean")), (x, others, kept, asked)


def _backward(config, residuals, cotangents):
    x, others, kept, asked = residuals
    d_out, d_mean = cotangents
    d_out = jnp.zeros_like(kept["out"]) if isinstance(d_out, SymbolicZero) else d_out
    d_mean = None if isinstance(d_mean, SymbolicZero) else d_mean
    to_state = bool(asked) or d_mean is not None
    gradients, of_state = core_backward(config, x, others, kept, d_out, d_mean, to_state)
    return gradients, dict.fromkeys(others) | of_state


def core_forward(config: TransformerConfig, x: dict, others: dict) -> dict:
    """Runs the forward kernel. x, others: see `operands`.

    Any operand may also be a stack of such arrays for all layers, with a leading axis of n_layer; others then has
    layer, int32 [1]. If others has out_stack or mean_stack, that result is the stack, with this layer's array written
    into it.
    """
    return _on_each_device(forward, forward_operands, config, x | others)


def core_backward(
    config: TransformerConfig, x: dict, others: dict, kept: dict, d_out, d_mean: jax.Array | None, to_state: bool
) -> tuple[dict, dict]:
    """Computes the gradients of x and, if to_state, of STATE. x, others: as for `core_forward`. kept: its out and
    log_total. d_out, d_mean: the gradients of its output, gated if there are gates, and of its mean; None for zeros."""
    given = x | others | kept | dict(d_out=d_out)
    if config.agg_cache:
        given |= _on_each_device(caches_again, caches_operands, config, x | others)
    if to_state:
        no_cache = (*others["k_window"].shape[:3], 1, 1)
        size = others["first_mean"].shape if config.agg_cache else no_cache
        given["d_mean"] = jnp.zeros(size, jnp.float32) if d_mean is None or not config.agg_cache else d_mean
    made = _on_each_device(backward, backward_operands, config, given, are_sums=True)

    small = made["small_sums"]  # [N R, B, H, G, I, 8, K]
    small = {name: small[..., row, :] for row, name in enumerate(SMALL_SUMS)}
    gradients = {name: made[f"{name}_gradient"] for name in ("q", "k", "v", "gate") if name in x}
    gradients |= {name: jnp.sum(small[name], axis=(0, 1, 4))[:, :, None] for name in ("u", "v_bias")}
    gradients["at_reach"] = jnp.sum(small["at_reach"], axis=(0, 1, 3, 4))[:, None]
    gradients["by_distance"] = jnp.sum(made["by_distance_gradient"], axis=0)
    gradients = {name: gradient.astype(x[name].dtype) for name, gradient in gradients.items()}
    of_state = {name: made[f"{name}_gradient"] for name in STATE if name in others and to_state}
    return gradients, {name: gradient.astype(others[name].dtype) for name, gradient in of_state.items()}


_core.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_each_device(
    function, operands, config: TransformerConfig, x: dict[str, jax.Array], are_sums: bool = False
) -> dict[str, jax.Array]:
    """Runs function(shape, x) on each device's part. operands: those of the kernel. are_sums: see Placement."""
    device_kind, n_per_key_head = placement().device_kind(), x["q"].shape[3]

    axes = axes_of(config.value_names[1])

    def is_stack(name, array):
        return array.ndim > len(axes[name.removesuffix("_stack")])

    def axes_with_layers(name, array):
        own = axes[name.removesuffix("_stack")]
        return ("layers", *own) if is_stack(name, array) else own

    def shard_axis(name, array):
        return 1 if is_stack(name, array) else 0

    def of_device(x):
        shape = shape_of(config, device_kind, x["q"].shape, x["v"].shape[-1], "gate" in x)
        n_shards = x["k_window"].shape[-5]  # 1 on a device
        own = {
            name: lax.index_in_dim(array, 0, shard_axis(name, array), keepdims=False)
            if name.removesuffix("_stack") in OF_SHARD
            else array
            for name, array in x.items()
        }
        if "d_mean" in x:  # all devices that share the query heads have it, and each takes its share
            own["d_mean"] *= shape.n_per_key_head / n_per_key_head
        if "d_mean" in x and config.agg_cache:
            own["inverse_last"] = x["inverse_after"][-1]
        made = function(sized(shape, operands, own), own)
        for name in OF_SHARD:
            if name in made:
                axis = 1 if f"{name}_stack" in x else 0
                sizes = (*made[name].shape[:axis], n_shards, *made[name].shape[axis:])
                made[name] = jnp.broadcast_to(jnp.expand_dims(made[name], axis), sizes)
        return made

    return placement().on_each_device(of_device, axes_with_layers, are_sums)(x)
