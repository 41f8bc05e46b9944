"""The loop over layers for attention by kernels, with a backward pass of its own.

`lax.scan` hands each layer its part of what the forward pass kept, and a kernel can only be handed a copy of that part.
Here the backward pass is a loop too, but what was kept lies still, in arrays with a leading axis of n_layer: kernels
are given the whole arrays and the layer's number.

What a layer keeps is what remat=projections keeps, with one exception: the product of attention's output and gate,
which the gradient of the next projection needs, is made again. It would be the largest array but two.

Each unit is four functions: `raw` (projections), `prepared` (norms, quantizer), the kernels, `residual`. The first, the
second and the last are differentiated by JAX, here, one after the other; their forward parts are not computed again
where the gradient does not need them.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax import lax
from jax.custom_derivatives import SymbolicZero

from tvq_pod.nn.attn import VQAttention
from tvq_pod.nn.axes import constrain
from tvq_pod.nn.mlp import MLP
from tvq_pod.nn.pallas.core import core_backward, core_forward, operands, state_after
from tvq_pod.nn.pallas.tile import silu
from tvq_pod.nn.types import UNITS, TransformerConfig, VQSpec

RESIDUAL_STREAM = ("blocks", "batch", "token", "residual")


class Given(NamedTuple):
    """What every layer reads and no gradient reaches. rngs: of the model's random streams, each with n_layer keys."""

    rngs: dict[str, LazyRng]
    doc_ids: jax.Array
    vq_spec: VQSpec | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_loop(config: TransformerConfig, params: dict, x: jax.Array, state: dict, given: Given):
    """All layers: x [R, B, L, D], params and state stacked. Returns x, the next state, and l_commit and l_codebook,
    float32 [n_layer] each."""
    x, (new_state, losses, _) = _loop(config, params, x, state, given)
    return x, new_state, losses


def _loop(config, params, x, state, given: Given, keeps: bool = False):
    stacks = _empty_stacks(config, x, state, keeps)

    def turn(carry, own):
        x, stacks = carry
        layer, params, rngs = own
        x, stacks, new_state, losses, kept = _layer(config, params, x, state, given._replace(rngs=rngs), layer, stacks, keeps)
        return (x, stacks), (new_state, losses, kept)

    (x, stacks), (new_state, losses, kept) = lax.scan(
        turn, (x, stacks), (jnp.arange(config.n_layer), params, given.rngs)
    )
    for name in stacks:
        new_state[name]["aggcache"]["upper_div_lower"] = stacks[name].pop("mean")
        if keeps:
            kept[name] |= stacks[name]
    return x, (new_state, losses, kept)


def _empty_stacks(c, x, state, keeps):
    n_blocks, n_rows, length, _ = x.shape
    stacks = {}
    for name in c.attention_units:
        queries = c.n_layer, n_blocks, n_rows, c.n_key_head, c.n_head // c.n_key_head
        stacks[name] = dict(mean=lax.empty(state[name]["aggcache"]["upper_div_lower"].shape, jnp.float32))
        if keeps:
            stacks[name] |= dict(
                out=lax.empty((*queries, length, c.d_v), jnp.dtype(c.dtype)),
                log_total=lax.empty((*queries, 1, length), jnp.float32),
            )
    return stacks


def _layer(config, params, x, state, given: Given, layer, stacks, keeps):
    """One layer. Returns x, the next state, the losses, and what to keep of each unit."""
    new_state, kept, losses, stacks = {}, {}, [], dict(stacks)
    for name in UNITS:
        if name in config.attention_units:
            unit = _Attention(config, name, given)
            res, new_state[name], own, kept[name], stacks[name] = unit.forward(
                params[name], x, state[name], layer, stacks[name]
            )
            losses.append(own)
        else:
            res, kept[name] = _Mlp(config, name, given).forward(params[name], x)
        x = constrain(x + res, *RESIDUAL_STREAM)
    return x, stacks, new_state, jax.tree.map(lambda *own: sum(own), *losses), kept if keeps else None


def _forward(config, params, x, state, given):
    differentiates_state = any(leaf.perturbed for leaf in jax.tree.leaves(state, is_leaf=_is_primal))
    params, x, state, given = (
        jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal) for tree in (params, x, state, given)
    )
    x_after, (new_state, losses, kept) = _loop(config, params, x, state, given, keeps=True)
    asked = ({},) if differentiates_state else ()  # what is kept has arrays as leaves: so the answer is in its structure
    return (x_after, new_state, losses), (params, x, state, given, kept, asked)


def _backward(config, residuals, cotangents):
    params, x, state, given, kept, asked = residuals
    d_x, d_state, d_losses = cotangents
    d_x = jnp.zeros_like(x) if isinstance(d_x, SymbolicZero) else d_x
    d_losses = jax.tree.map(lambda d: jnp.zeros(d.shape) if isinstance(d, SymbolicZero) else d, d_losses)
    if asked or any(not isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(d_state)):
        raise NotImplementedError

    def turn(d_x, own):
        layer, params, rngs, d_losses = own
        here = given._replace(rngs=rngs)
        d_params = {}
        for name in reversed(UNITS):
            if name in config.attention_units:
                unit = _Attention(config, name, here)
                d_params[name], d_own = unit.backward(
                    params[name], kept[name], state[name], layer, d_x, d_losses
                )
            else:
                d_params[name], d_own = _Mlp(config, name, here).backward(params[name], _at(layer, kept[name]), d_x)
            d_x = constrain(d_x + d_own, *RESIDUAL_STREAM)
        return d_x, d_params

    own = jnp.arange(config.n_layer), params, given.rngs, d_losses
    d_x, d_params = lax.scan(turn, d_x, own, reverse=True)
    return d_params, d_x, None, None


layer_loop.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(x) -> bool:
    return hasattr(x, "perturbed")


def _at(layer: jax.Array, stacked):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), stacked)


class _Unit:
    """A unit of one layer, as functions of its parameters."""

    def __init__(self, module, name: str, given: Given):
        self._module, self._given = module, given
        self._rngs = {stream: LazyRng.create(rng, name) for stream, rng in given.rngs.items()}

    def _apply(self, method: str, params: dict, *args):
        def second_time(module):
            # flax's scan, in model.py, traces its body twice and numbers the draws of both: masks must be the same
            getattr(module, method)(*args)
            return getattr(module, method)(*args)

        return self._module.apply({"params": params}, method=second_time, rngs=self._rngs)


class _Mlp(_Unit):
    def __init__(self, config: TransformerConfig, name: str, given: Given):
        super().__init__(MLP(config), name, given)

    def forward(self, params, x):
        hidden = self._apply("raw", params, x)
        return self._apply("residual", params, hidden), dict(x=x, hidden=hidden)

    def backward(self, params, kept, d_res):
        _, vjp = jax.vjp(functools.partial(self._apply, "residual"), params, kept["hidden"])
        d_params, d_hidden = vjp(d_res)
        _, vjp = jax.vjp(functools.partial(self._apply, "raw"), params, kept["x"])
        more, d_x = vjp(d_hidden)
        return jax.tree.map(jnp.add, d_params, more), d_x


class _Attention(_Unit):
    def __init__(self, config: TransformerConfig, name: str, given: Given):
        super().__init__(VQAttention(config), name, given)
        self._config = config

    def forward(self, params, x, state, layer, stacks):
        raw = self._raw(params, x)
        before = _at(layer, state)
        (x_operands, losses), (shape, others, after, present) = self._operands(params, raw, before, None)
        others = others | self._stacked_state(state) | dict(layer=layer[None])
        made = core_forward(shape, x_operands, others | {f"{n}_stack": s for n, s in stacks.items()})
        gated = made["gated"] if shape.is_gated else _at(layer, made["out"]) if "out" in stacks else made["out"]
        new_state = state_after(self._config, present, shape.is_gated, before, after, jnp.zeros([]))
        kept = dict(x=x, raw=raw, z=present["z"])
        return self._residual(params, gated), new_state, losses, kept, {name: made[name] for name in stacks}

    def _stacked_state(self, state):
        window = state["xlcache"]
        return dict(k_window=window["k_hat"], v_window=window["v"], first_mean=state["aggcache"]["upper_div_lower"])

    def backward(self, params, stacked, state, layer, d_res, d_losses):
        kept = _at(layer, stacked)
        before = _at(layer, state)
        x, raw, out = kept["x"], kept["raw"], kept["out"]
        gated = out
        if raw["gate"] is not None:
            gated = (out * silu(raw["gate"])).astype(out.dtype)
        _, vjp = jax.vjp(self._residual, params, gated)
        of_residual, d_gated = vjp(d_res)

        static = None

        def prepared(params, raw):
            nonlocal static
            differentiated, (static, *constant) = self._operands(params, raw, before, kept["z"])
            return differentiated, constant

        (x_operands, _), vjp, (others, *_) = jax.vjp(prepared, params, raw, has_aux=True)
        kept = {name: stacked[name] for name in ("out", "log_total")}
        x_operands |= {name: stacked["raw"][name] for name in ("v", "gate") if name in x_operands}
        others = others | self._stacked_state(state) | dict(layer=layer[None])
        d_operands, _ = core_backward(static, x_operands, others, kept, d_gated, None, False)
        of_prepared, d_raw = vjp((d_operands, d_losses))
        _, vjp = jax.vjp(self._raw, params, x)
        of_raw, d_x = vjp(d_raw)
        return jax.tree.map(lambda *own: sum(own), of_residual, of_prepared, of_raw), d_x

    def _operands(self, params, raw, state, shortcodes):
        """((x, losses), (shape, others, after, present)) of `operands`."""
        c, given = self._config, self._given
        made = self._apply("prepared", params, raw["q"], raw["k"], given.vq_spec, shortcodes)
        present = dict(z=made["shortcodes"], k_hat=made["quantized"], v=raw["v"], doc_ids=given.doc_ids)
        shape, x, others, after = operands(c, made["biases"], _grouped(made["q"], c), present, raw["gate"], state)
        losses = tuple(made["losses"][name] for name in ("l_commit", "l_codebook"))
        return (x, losses), (shape, others, after, present)

    def _raw(self, params, x):
        raw = self._apply("raw", params, x)
        return raw | dict(gate=None if raw["gate"] is None else _grouped(raw["gate"], self._config))

    def _residual(self, params, out):
        """[R, B, H, G, L, V] -> [R, B, L, D]."""
        return self._apply("residual", params, out.reshape(*out.shape[:2], -1, *out.shape[4:]))


def _grouped(x: jax.Array, c: TransformerConfig) -> jax.Array:
    """[R, B, Q, L, width] -> [R, B, H, G, L, width]: query heads by their key head."""
    return x.reshape(*x.shape[:2], c.n_key_head, -1, *x.shape[3:])
