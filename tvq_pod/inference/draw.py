"""Draws tokens from what a model says of them."""

import jax
import jax.numpy as jnp

_SEARCH_STEPS = 30  # halvings: the float32 numbers from 0 to 1 have 2^30 bit patterns


def draw_tokens(logits: jax.Array, uniforms: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    """One token id for each row, int32 [B], from logits float32 [B, n_vocab] and numbers `uniforms` [B] in [0, 1).

    The likeliest tokens that have probability `top_p` together are drawn from (Holtzman et al., arXiv 1904.09751);
    temperature 0 takes the likeliest. Each row's token depends on that row alone. There is no sort, which would take
    most of a step's time where the vocabulary is large: the least weight in the nucleus is found by bisection.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature)
    if top_p < 1:
        weights = jnp.where(weights >= _least_in_nucleus(weights, top_p), weights, 0.0)
    sums = jnp.cumsum(weights, axis=-1)
    # a sum of zeros may differ from its neighbor by rounding: what has no weight is never drawn
    is_reached = (sums > uniforms[:, None] * sums[:, -1:]) & (weights > 0)
    drawn = jnp.where(jnp.any(is_reached, axis=-1), jnp.argmax(is_reached, axis=-1), jnp.argmax(weights, axis=-1))
    return drawn.astype(jnp.int32)


def _least_in_nucleus(weights: jax.Array, top_p: float) -> jax.Array:
    """The greatest t, float32 [B, 1], such that weights [B, n] of at least t have a share of `top_p`. weights: in
    0 .. 1, where the order of floats is the order of their bits."""
    wanted = top_p * jnp.sum(weights, axis=-1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high + 1) // 2
        least = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        is_enough = jnp.sum(jnp.where(weights >= least, weights, 0.0), axis=-1) >= wanted
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle - 1)

    low = jnp.zeros_like(wanted, jnp.int32)
    high = jnp.full_like(low, jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32))
    low, _ = jax.lax.fori_loop(0, _SEARCH_STEPS, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]
