"""The loop over layers for attention by kernels, with a backward pass of its own.

`lax.scan` passes a layer its part of every stacked array, and stores the layer's results. A kernel can only be passed a
copy of that part, and its results are copied once more: 120 of 384 ms for configs/enwik8.py. So here the backward pass
is written as a loop, too, in which stacked arrays are not moved. The kernels get the complete stacks, of states and of
arrays that the forward pass kept, with the layer's index; they read and write that layer's part.

For each unit the forward pass keeps what remat=projections keeps, except the product of attention's output and its
gate, which the gradient of the next projection needs: it is recomputed. With remat=full it keeps the unit's input.

A unit consists of four functions: `raw` has the projections, `prepared` has norms and the quantizer, then come the
kernels, then `residual`. JAX differentiates all but the kernels one by one; of their forward pass, only what a gradient
needs is recomputed.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng
from jax import lax
from jax.custom_derivatives import SymbolicZero

from tvq_pod.nn.attn import VQAttention, grouped
from tvq_pod.nn.axes import constrain, placement
from tvq_pod.nn.layers import inverse_rms
from tvq_pod.nn.mlp import MLP
from tvq_pod.nn.pallas.core import STATE, core_backward, core_forward, operands, with_mean
from tvq_pod.nn.pallas.tile import silu
from tvq_pod.nn.types import UNITS, TransformerConfig, VQSpec

RESIDUAL_STREAM = ("blocks", "batch", "token", "residual")


class Given(NamedTuple):
    """Inputs of every layer without gradients: rngs, by name of the stream, each with n_layer keys; doc_ids int32 [R,
    B, L]; loss_mask [R, B, L] in vq_spec; distances, see attn.py."""

    rngs: dict[str, LazyRng]
    doc_ids: jax.Array
    vq_spec: VQSpec | None
    distances: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_loop(config: TransformerConfig, params: dict, x: jax.Array, state: dict, given: Given):
    """Applies all layers to x [R, B, L, D]; params and state are stacks with a leading axis of n_layer.

    Returns x, the next state, and l_commit and l_codebook, float32 [n_layer] each.
    """
    x, new_state, losses, _ = _loop(config, params, x, state, given, keeps=False)
    return x, new_state, losses


def _loop(config: TransformerConfig, params, x, state, given: Given, keeps: bool):
    """The results of `layer_loop`, and the arrays to keep for the backward pass: stacks for each unit; or, if the loop
    is unrolled, arrays for each layer and unit."""

    def layer(x, inverse, own, stacks):
        number, params, rngs = own
        new_state, kept, losses = {}, {}, []
        for name, unit in _units(config, given._replace(rngs=rngs)).items():
            into = {} if stacks is None else {kind: stacks[kind].get(name, {}) for kind in stacks}
            given_to_unit = params[name], x, inverse, state.get(name), number, into
            res, new_state[name], own_kept, own_losses = unit.forward(*given_to_unit)
            own_kept = dict(x=x) if config.remat == "full" else dict(x=x, inverse=inverse) | own_kept
            kept[name] = own_kept if keeps else {}
            x = constrain(x + res, *RESIDUAL_STREAM)
            inverse = inverse_rms(x)  # here, where x is computed, so that it is not read again
            losses += own_losses
        return x, inverse, dict(state=new_state, kept=kept), jax.tree.map(lambda *of_units: sum(of_units), *losses)

    def turn(carry, own):
        x, inverse, stacks = carry
        x, inverse, made, losses = layer(x, inverse, own, stacks)

        def put(stack, array):  # the kernels have written theirs
            return array if array.ndim == stack.ndim else lax.dynamic_update_index_in_dim(stack, array, own[0], axis=0)

        stacks = {kind: jax.tree.map(put, stack, made[kind]) for kind, stack in stacks.items()}
        return (x, inverse, stacks), (losses, made["kept"] if "kept" not in stacks else {})

    layers = np.arange(config.n_layer), params, given.rngs
    first, inverse = jax.tree.map(lambda leaf: leaf[0], layers), inverse_rms(x)
    _, _, shapes, _ = jax.eval_shape(functools.partial(layer, stacks=None), x, inverse, first)
    shapes = {kind: shapes[kind] for kind in (["state"] if _is_written_out(config) else ["state", "kept"])}
    stacks = jax.tree.map(lambda array: lax.empty((config.n_layer, *array.shape), array.dtype), shapes)
    (x, _, stacks), made = _turns(config, turn, (x, inverse, stacks), layers)
    new_state = {name: stacks["state"][name] for name in config.attention_units}
    if _is_written_out(config):
        return x, new_state, _stacked([losses for losses, _ in made]), [kept for _, kept in made]
    return x, new_state, made[0], stacks["kept"]


def _stacked(of_layers: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_layers)


def _is_written_out(config: TransformerConfig) -> bool:
    return config.unroll >= config.n_layer


def _turns(config: TransformerConfig, turn, carry, layers, reverse: bool = False):
    """lax.scan; or, if the loop is unrolled, a Python loop that returns a list of the results."""
    if not _is_written_out(config):
        return lax.scan(turn, carry, layers, reverse=reverse, unroll=config.unroll)
    made = {}
    for number in reversed(range(config.n_layer)) if reverse else range(config.n_layer):
        carry, made[number] = turn(carry, jax.tree.map(lambda leaf, number=number: leaf[number], layers))
    return carry, [made[number] for number in range(config.n_layer)]


def _forward(config: TransformerConfig, params, x, state, given):
    to_state = any(leaf.perturbed for leaf in jax.tree.leaves(state, is_leaf=_is_primal))
    values = functools.partial(jax.tree.map, lambda leaf: leaf.value, is_leaf=_is_primal)
    params, x, state, given = values(params), values(x), values(state), values(given)
    *made, kept = _loop(config, params, x, state, given, keeps=True)
    asked = ({},) if to_state else ()  # the leaves of what is kept must be arrays, so the structure has the answer
    return tuple(made), (params, x, state, given, kept, asked)


def _backward(config: TransformerConfig, residuals, cotangents):
    params, x, state, given, kept, asked = residuals
    to_state = bool(asked) or not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(cotangents[1]))
    cotangents = jax.tree.map(_instantiated, cotangents)
    if to_state:
        _, vjp = jax.vjp(functools.partial(_plain_loop, config, given), params, x, state)
        return *vjp(cotangents), None

    def turn(d_x, own):
        number, params, rngs, d_losses = own
        d_params = {}
        for name, unit in reversed(_units(config, given._replace(rngs=rngs)).items()):
            stacks = kept[number][name] if _is_written_out(config) else kept[name]
            own_kept = stacks if _is_written_out(config) else _of_layer(number, stacks)
            unit_x, unit_state = own_kept["x"], state.get(name)
            if config.remat == "full":
                # otherwise XLA, which sees all iterations, would do this early, or keep the forward pass's result
                unit_x, d_x = lax.optimization_barrier((unit_x, d_x))
                inverse = inverse_rms(unit_x)
                _, _, own_kept, _ = unit.forward(params[name], unit_x, inverse, unit_state, number, {})
                stacks = own_kept = own_kept | dict(inverse=inverse)
            of_unit = params[name], unit_x, unit_state, number, own_kept, stacks
            d_params[name], d_own = unit.backward(*of_unit, d_x, d_losses)
            d_x = constrain(d_x + d_own, *RESIDUAL_STREAM)
        return d_x, d_params

    d_x, _, d_losses = cotangents
    layers = np.arange(config.n_layer), params, given.rngs, d_losses
    d_x, d_params = _turns(config, turn, d_x, layers, reverse=True)
    return _stacked(d_params) if isinstance(d_params, list) else d_params, d_x, None, None


layer_loop.defvjp(_forward, _backward, symbolic_zeros=True)


def _plain_loop(config: TransformerConfig, given: Given, params, x, state):
    """The same results as `layer_loop`, differentiable by JAX: gradients reach the states, too."""

    def turn(x, own):
        params, rngs, state = own
        new_state, losses = {}, []
        for name, unit in _units(config, given._replace(rngs=rngs)).items():
            if name in state:
                new_state[name], out = unit.apply("blocks", params[name], state[name], x, given.doc_ids, given.vq_spec)
                losses.append((out["l_commit"], out["l_codebook"]))
                x = x + out["res"]
            else:
                x = x + unit.apply("__call__", params[name], x)
        return x, (new_state, jax.tree.map(lambda *of_units: sum(of_units), *losses))

    x, (new_state, losses) = lax.scan(turn, x, (params, given.rngs, state))
    return x, new_state, losses


def _instantiated(cotangent):
    """The cotangent, or an array of zeros if it is a SymbolicZero."""
    is_zero = isinstance(cotangent, SymbolicZero)
    return jnp.zeros(cotangent.shape, cast(Any, cotangent).dtype) if is_zero else cotangent


def _is_primal(x) -> bool:
    return hasattr(x, "perturbed")


def _put(number: jax.Array, raw: dict, stacks: dict) -> dict:
    """Writes values and gates into the stacks of kept arrays, if there are any."""
    kept = stacks.get("kept", {}).get("raw", {})
    return {
        name: lax.dynamic_update_index_in_dim(kept[name], raw[name], number, axis=0)
        for name in ("v", "gate")
        if name in kept
    }


def _values(raw: dict, number: jax.Array) -> dict:
    """The values' stack and the layer's index, if there is a stack; see start.py."""
    return dict(v=raw["v"], layer=jnp.asarray(number, jnp.int32)[None]) if "v" in raw else {}


def _of_layer(number: jax.Array, stacks):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), stacks)


def _units(config: TransformerConfig, given: Given) -> dict[str, "_Attention | _Mlp"]:
    """The units of one layer, by name. given.rngs: this layer's keys."""
    return {
        name: _Attention(config, name, given) if name in config.attention_units else _Mlp(config, name, given)
        for name in UNITS
    }


class _Unit:
    """A unit of one layer: its module's methods, as functions of parameters.

    forward(params, x, inverse, state, number, stacks) returns the term added to x, the next state, the arrays to keep
    besides x and inverse, and a list of losses. backward(params, x, state, number, kept, stacks, d_res, d_losses)
    returns the gradients of params and x. inverse: inverse_rms of x. state: the states of all layers, stacked. number:
    the layer's index. stacks: see `_Attention`.
    """

    def __init__(self, module: VQAttention | MLP, given: Given):
        assert module.name is not None
        self._module, self._given = module, given
        self._rngs = {stream: LazyRng.create(rng, module.name) for stream, rng in given.rngs.items()}

    def apply(self, method: str, params: dict, *args):
        """Calls a method of the module."""

        def second_time(module):
            # flax's scan (model.py) traces its body twice and numbers the draws of both traces. Masks must be the same.
            if self._rngs:
                getattr(module, method)(*args)
            return getattr(module, method)(*args)

        with jax.named_scope("layers"):
            return cast(Any, self._module).apply({"params": params}, method=second_time, rngs=self._rngs)


class _Mlp(_Unit):
    def __init__(self, config: TransformerConfig, name: str, given: Given):
        super().__init__(MLP(config, name=name, parent=None), given)

    def forward(self, params, x, inverse, state, number, stacks):
        hidden = self.apply("raw", params, x, inverse)
        return self.apply("residual", params, hidden), {}, dict(hidden=hidden), []

    def backward(self, params, x, state, number, kept, stacks, d_res, d_losses):
        d_params, d_hidden = _vjp(functools.partial(self.apply, "residual"), params, kept["hidden"])(d_res)
        raw = functools.partial(self.apply, "raw")
        more, d_x = _vjp(lambda params, x: raw(params, x, kept["inverse"]), params, x)(d_hidden)
        return jax.tree.map(jnp.add, d_params, more), d_x


class _Attention(_Unit):
    def __init__(self, config: TransformerConfig, name: str, given: Given):
        super().__init__(VQAttention(config, name=name, parent=None), given)
        self._config = config

    def forward(self, params, x, inverse, state, number, stacks):
        """stacks: `state` and `kept` of all layers, if they are stacks: the kernels write into some of them."""
        raw = self._raw(inverse, params, x)
        of_keys = inverse_rms(raw["q"]), inverse_rms(raw["k"])
        # Kernels read from the stacks what is kept there anyway, so that it is written only once.
        into, in_stacks = self._kernels_stacks(stacks), _put(number, raw, stacks)
        operands, (of_state, losses), (others, new_state, z) = self._operands(
            params, raw, _of_layer(number, state), None, of_keys, _values(in_stacks, number)
        )
        raw = raw | in_stacks
        operands |= {name: raw[name] for name in ("v", "gate") if name in operands}
        made = core_forward(self._config, operands, self._from_stacks(others | of_state, state, number) | into)
        mean, out = made.get("mean"), made["out"]
        if "mean_stack" in into and mean is not None:
            mean = jnp.swapaxes(mean, 0, 1)  # shards first
        new_state = with_mean(new_state, mean)
        gated = made["gated"] if "gate" in operands else _of_layer(number, out) if "out_stack" in into else out
        kept = dict(raw=raw, z=z, of_keys=of_keys, out=out, log_total=made["log_total"])
        if not _is_whole():
            kept |= dict(started=of_state | {name: array for name, array in others.items() if name != "codes"})
        return self._residual(params, gated), new_state, kept, [losses]

    def backward(self, params, x, state, number, kept, stacks, d_res, d_losses):
        """kept: this layer's. stacks: the same for all layers, for the kernels; or again this layer's."""
        raw, out, before = kept["raw"], kept["out"], _of_layer(number, state)
        gated = (out * silu(raw["gate"])).astype(out.dtype) if "gate" in raw else out
        of_residual, d_gated = _vjp(self._residual, params, gated)(d_res)

        stacked = _values(stacks["raw"], number) if stacks["raw"]["v"].ndim > raw["v"].ndim else {}

        def prepared(params, raw):
            operands, (of_state, losses), constant = self._operands(
                params, raw, before, kept["z"], kept["of_keys"], stacked
            )
            return (operands, of_state, losses), constant

        (operands, of_state, _), vjp, (others, *_) = jax.vjp(prepared, params, raw, has_aux=True)
        operands = operands | {name: stacks["raw"][name] for name in ("v", "gate") if name in operands}
        others = self._from_stacks(others | of_state | kept.get("started", {}), state, number)
        of_core = {name: stacks[name] for name in ("out", "log_total")}
        d_operands, d_state = core_backward(self._config, operands, others, of_core, d_gated, None, bool(of_state))
        of_prepared, d_raw = vjp((d_operands, d_state, d_losses))
        of_raw, d_x = _vjp(functools.partial(self._raw, kept["inverse"]), params, x)(d_raw)
        return jax.tree.map(lambda *parts: sum(parts), of_residual, of_prepared, of_raw), d_x

    def _raw(self, inverse, params, x):
        """Calls VQAttention.raw; gate is [R, B, H, G, L, V], if there is one."""
        raw = self.apply("raw", params, x, inverse)
        return {name: grouped(a, self._config) if name == "gate" else a for name, a in raw.items() if a is not None}

    def _operands(self, params, raw, state, shortcodes, of_keys, stacked):
        """The kernels' operands: those with a gradient; (others with a gradient, losses); (others, the next state,
        shortcodes). stacked: see start.py."""
        c, given = self._config, self._given
        made = self.apply("prepared", params, raw["q"], raw["k"], given.vq_spec, shortcodes, of_keys, given.distances)
        present = dict(z=made["shortcodes"], k_hat=made["quantized"], v=raw["v"], doc_ids=given.doc_ids)
        q, gate = grouped(made["q"], c), raw.get("gate")
        x, others, new_state = operands(c, made["biases"], q, present, gate, state, stacked)
        # each device except the first computes the state that its shard begins with, from tokens that others have read
        has_gradient = c.grad_thru_cache and not _is_whole()
        of_state = {name: others.pop(name) for name in STATE if name in others} if has_gradient else {}
        losses = made["losses"]["l_commit"], made["losses"]["l_codebook"]
        return x, (of_state, losses), (others, new_state, made["shortcodes"])

    def _from_stacks(self, others: dict, state: dict, number) -> dict:
        """Adds to others the stacked state of all layers, with an axis for the one shard."""
        stacks: dict[str, jax.Array] = {}
        if _is_whole():
            window, mean = state["xlcache"], state["aggcache"]["upper_div_lower"]
            stacks = dict(k_window=window["k_hat"], v_window=window["v"], first_mean=mean)
            stacks = {name: jnp.expand_dims(stack, 1) for name, stack in stacks.items() if name in others}
        return others | stacks | dict(layer=jnp.asarray(number, jnp.int32)[None])

    def _kernels_stacks(self, stacks: dict) -> dict:
        """The stacks that the forward kernel writes into."""
        found = {}
        if "out" in stacks.get("kept", {}):
            found["out_stack"] = stacks["kept"]["out"]
        if "state" in stacks and self._config.agg_cache and _is_whole():
            found["mean_stack"] = jnp.expand_dims(stacks["state"]["aggcache"]["upper_div_lower"], 1)
        return found

    def _residual(self, params, out):
        """Projects [R, B, H, G, L, V] to [R, B, L, D]."""
        return self.apply("residual", params, out.reshape(*out.shape[:2], -1, *out.shape[4:]))


def _is_whole() -> bool:
    """Whether a device has all blocks of an update."""
    return placement().n_shards("blocks") == 1


def _vjp(function, *args):
    return jax.vjp(function, *args)[1]
