"""The attention core of all blocks, by the kernels, with its gradient: what attn.py calls with `attention="pallas"`.

It does what attend.py, cache.py and scores.py do, and the SiLU of values and gates besides. What is small is made by
XLA: counts, positions, the table of biases in the order of columns. Gradients go to queries, u, v, keys, values, gates,
the relative table and the state; reverse mode only. For the backward pass the output and the logarithm of each query's
sum are kept, and the caches are made again.

Shapes: R blocks of L, B rows, H key heads, G query heads for each, M = L, S codes, K, V.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from tvq_pod.nn.axes import placement
from tvq_pod.nn.cache import caches, count_leaving, log_counts
from tvq_pod.nn.pallas.backward import SMALL_SUMS, backward
from tvq_pod.nn.pallas.call import Shape
from tvq_pod.nn.pallas.fit import shape_of
from tvq_pod.nn.pallas.forward import caches_again, forward
from tvq_pod.nn.pallas.tile import silu
from tvq_pod.nn.state import doc_positions, next_state
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.nn.window import leaving_chunks

_BLOCKS = ("blocks", "batch", "key_heads")
AXES = dict(  # of every operand and result of the kernels
    q=(*_BLOCKS, None, "token", "key"),
    u=("key_heads", None, None, "key"),
    v_bias=("key_heads", None, None, "key"),
    k=(*_BLOCKS, "token", "key"),
    v=(*_BLOCKS, "token", "shared_value"),
    gate=(*_BLOCKS, None, "token", "shared_value"),
    by_distance=("key_heads", None, "key"),
    at_reach=("key_heads", None, "key"),
    k_window=("batch", "key_heads", "window", "key"),
    v_window=("batch", "key_heads", "window", "shared_value"),
    first_mean=("batch", "key_heads", "codes", "shared_value"),
    codes=("key_heads", "codes", "key"),
    kept=("blocks", "batch"),
    positions=("blocks", "batch", None, "token"),
    sees_cache=("blocks", "batch", None, "token"),
    log_counts=(*_BLOCKS, None, "codes"),
    inverse=(*_BLOCKS, None, "codes"),
    leaving=(*_BLOCKS, None, "token"),
    first_count=("batch", "key_heads", None, "codes"),
    inverse_after=(*_BLOCKS, None, "codes"),
    inverse_last=("batch", "key_heads", None, "codes"),
    out=(*_BLOCKS, None, "token", "shared_value"),
    gated=(*_BLOCKS, None, "token", "shared_value"),
    d_out=(*_BLOCKS, None, "token", "shared_value"),
    log_total=(*_BLOCKS, None, None, "token"),
    means=(*_BLOCKS, "codes", "shared_value"),
    mean=("batch", "key_heads", "codes", "shared_value"),
    d_mean=("batch", "key_heads", "codes", "shared_value"),
    q_gradient=(*_BLOCKS, None, "token", "key"),
    k_gradient=(*_BLOCKS, "token", "key"),
    v_gradient=(*_BLOCKS, "token", "shared_value"),
    gate_gradient=(*_BLOCKS, None, "token", "shared_value"),
    by_distance_gradient=("batch", "key_heads", None, "key"),
    small_sums=(*_BLOCKS, None, None, None, "key"),
    k_window_gradient=("batch", "key_heads", "window", "key"),
    v_window_gradient=("batch", "key_heads", "window", "shared_value"),
    first_mean_gradient=("batch", "key_heads", "codes", "shared_value"),
)
COUNTS = ("log_counts", "inverse", "inverse_after", "inverse_last", "first_count")
CONSTANT = ("codes", "positions", "sees_cache", "leaving", "kept", *COUNTS)
STATE = ("k_window", "v_window", "first_mean")


def fused_attention(
    config: TransformerConfig, biases: dict, q, present: dict, gate: jax.Array | None, state: dict
) -> tuple[jax.Array, dict]:
    """Attends R blocks.

    q: [R, B, H, G, L, K]. present: z int32 [R, B, H, L], k_hat [R, B, H, L, K], v [R, B, H, L, V], doc_ids int32
    [R, B, L]. gate: [R, B, H, G, L, V], or None. With a gate, it and v come as projected: values are silu(v), and the
    output is multiplied by silu(gate). biases: u and v [Q, K], r [H, M + 1, K], codes [H, S, K]. state: as
    `VQAttention.initial_state` returns it.
    Returns [R, B, H, G, L, V] in the dtype of q, and the state after the last block.
    """
    shape, x, others, after = operands(config, biases, q, present, gate, state)
    out, mean = cast(tuple[jax.Array, jax.Array | None], _core(shape, x, others))
    return out, state_after(config, present, gate is not None, state, after, mean)


def operands(config: TransformerConfig, biases: dict, q, present: dict, gate: jax.Array | None, state: dict):
    """What the kernels take, for the arguments of `fused_attention`: (shape, x, others, after). Gradients pass through
    x always, through STATE of others if somebody asks, and through CONSTANT and after, which `state_after` needs, never.
    """
    n_blocks, n_rows, n_key_head, n_per_key_head, block_len, _ = q.shape
    c = config.replace(block_len=block_len)
    shape = shape_of(c, placement().device_kind(), n_blocks, n_rows, gate is not None)
    window, cache = state["xlcache"], state["aggcache"]
    leaving = leaving_chunks(window, present, ("z", "doc_ids"))
    latest, kept, z, counts = count_leaving(cache["latest_doc_id"], cache["lower"], leaving, c.reduction)
    r = biases["r"]
    u, v_bias = (biases[name].reshape(n_key_head, n_per_key_head, 1, c.d_k) for name in ("u", "v"))
    x = dict(
        q=q,
        u=u,
        v_bias=v_bias,
        k=present["k_hat"],
        v=present["v"],
        by_distance=jnp.concatenate([r[:, :1], r[:, 1 : c.mem_len][:, ::-1]], axis=1),  # row m: distance -m mod L
        at_reach=r[:, c.mem_len :],
    )
    others = dict(
        k_window=window["k_hat"],
        v_window=window["v"],
        positions=doc_positions(state, present["doc_ids"])[:, :, None],
        kept=kept.astype(jnp.int32),
    )
    if gate is not None:
        x["gate"] = gate
    if c.agg_cache:
        inverse = 1.0 / jnp.maximum(counts, 1.0)
        others |= dict(
            codes=biases["codes"],
            sees_cache=(present["doc_ids"] == latest[:-1, :, None]).astype(jnp.int32)[:, :, None],
            log_counts=log_counts(counts[:-1])[:, :, :, None],
            leaving=z[:, :, :, None],
            inverse=inverse[:-1, :, :, None],
            inverse_after=inverse[1:, :, :, None],
            inverse_last=inverse[-1, :, :, None],
            first_mean=cache["upper_div_lower"],
            first_count=cache["lower"][:, :, None],
        )
    return shape, x, others, dict(lower=counts[-1], latest_doc_id=latest[-1])


def state_after(config: TransformerConfig, present: dict, is_gated: bool, state: dict, after: dict, mean) -> dict:
    """The state after the last block, whose window is the last block. mean: as the kernel returns it, or None."""
    last = {name: array[-1] for name, array in present.items()}
    if is_gated:
        last["v"] = silu(last["v"]).astype(last["v"].dtype)
    ids_alone = state | dict(xlcache=dict(doc_ids=state["xlcache"]["doc_ids"]))
    new_state = next_state(dict(doc_ids=present["doc_ids"]), ids_alone) | dict(xlcache=last)
    if mean is None:
        values = silu(present["v"]).astype(present["v"].dtype) if is_gated else present["v"]
        leaving = leaving_chunks(state["xlcache"], present | dict(v=values))
        return new_state | dict(aggcache=caches(state["aggcache"], leaving, config.reduction)[1])
    return new_state | dict(aggcache=dict(upper_div_lower=mean, **after))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(shape: Shape, x: dict, others: dict) -> tuple[jax.Array, jax.Array | None]:
    """x: what has a gradient always; others: STATE, which has one if somebody asks, and CONSTANT, which never has."""
    made = _on_each_device(forward, shape, x | others)
    return made["gated" if shape.is_gated else "out"], made.get("mean")


def _forward(shape, x, others):
    x = {name: primal.value for name, primal in x.items()}
    to_state = any(others[name].perturbed for name in STATE if name in others)
    others = {name: primal.value for name, primal in others.items()}
    made = _on_each_device(forward, shape, x | others)
    kept = dict(out=made["out"], log_total=made["log_total"])
    asked = ({},) if to_state else ()  # what is kept has arrays as leaves: so the answer is in its structure
    return (made["gated" if shape.is_gated else "out"], made.get("mean")), (x, others, kept, asked)


def _backward(shape, residuals, cotangents):
    x, others, kept, asked = residuals
    d_out, d_mean = cotangents
    to_state = bool(asked) or not (d_mean is None or isinstance(d_mean, SymbolicZero))
    if to_state and shape.has_cache:
        d_mean = _instantiated(d_mean, others["first_mean"])
    gradients, of_state = core_backward(
        shape, x, others, kept, _instantiated(d_out, kept["out"]), d_mean if to_state else None, to_state
    )
    return gradients, dict.fromkeys(others) | of_state


def core_forward(shape: Shape, x: dict, others: dict) -> dict:
    """What `forward` returns, of all devices."""
    return _on_each_device(forward, shape, x | others)


def core_backward(shape: Shape, x: dict, others: dict, kept: dict, d_out, d_mean, to_state: bool) -> tuple[dict, dict]:
    """The gradients of x and, if wanted, of STATE. x, others: see `operands`. kept: out and log_total of
    `core_forward`. d_out, d_mean: the gradients of its (gated) output and, to_state, of its mean."""
    made_of = x | others | kept | dict(d_out=d_out)
    if shape.has_cache:
        made_of |= _on_each_device(caches_again, shape, x | others)
    if to_state:
        no_cache = jnp.zeros((*others["k_window"].shape[:2], 1, 1), jnp.float32)
        made_of["d_mean"] = d_mean if shape.has_cache else no_cache
    made = _on_each_device(backward, shape, made_of)

    small = made["small_sums"]  # [R, B, H, G, I, 8, K]
    small = {name: small[..., row, :] for row, name in enumerate(SMALL_SUMS)}
    gradients = {name: made[f"{name}_gradient"] for name in ("q", "k", "v", "gate") if name in x}
    gradients |= {name: jnp.sum(small[name], axis=(0, 1, 4))[:, :, None] for name in ("u", "v_bias")}
    gradients["at_reach"] = jnp.sum(small["at_reach"], axis=(0, 1, 3, 4))[:, None]
    gradients["by_distance"] = jnp.sum(made["by_distance_gradient"], axis=0)
    gradients = {name: gradient.astype(x[name].dtype) for name, gradient in gradients.items()}
    of_state = {name: made[f"{name}_gradient"] for name in STATE if name in others and to_state}
    return gradients, {name: gradient.astype(others[name].dtype) for name, gradient in of_state.items()}


_core.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiated(cotangent, like: jax.Array) -> jax.Array:
    return jnp.zeros_like(like) if isinstance(cotangent, SymbolicZero) else cotangent


def _on_each_device(function, shape: Shape, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """function(shape, x), of the rows and key heads that each device has."""

    def of_device(x):
        n_rows, n_key_head = x["q"].shape[1:3]
        return function(dataclasses.replace(shape, n_rows=n_rows, n_key_head=n_key_head), x)

    return placement().on_each_device(of_device, _axes_of)(x)


def _axes_of(name: str, array) -> tuple:
    """Names of an operand's or a result's axes. One axis more than usual is that of a stack of layers' arrays."""
    if name == "layer":
        return (None,)
    axes = AXES[name.removesuffix("_stack")]
    return axes if array.ndim == len(axes) else ("layers", *axes)
