"""Draws tokens from a model's logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_SEARCH_STEPS = 30  # halvings: the float32 numbers from 0 to 1 have 2^30 bit patterns


def draw_tokens(
    logits: jax.Array, uniforms: jax.Array, *, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0
) -> jax.Array:
    """Draws one token id for each row, int32 [B], from logits float32 [B, n_vocab] and numbers `uniforms` [B] in [0,
    1).

    Temperature comes first; 0 takes the likeliest token. The token is drawn from the top_k likeliest (0: all), and of
    these from the likeliest that together have probability `top_p` (Holtzman et al., arXiv 1904.09751), if their
    probability is at least min_p times that of the likeliest (Nguyen et al., arXiv 2407.01082). Tokens as likely as the
    last one kept are kept, too. Each row's token depends on that row alone. There is no sort, which would take most of
    a step's time with a large vocabulary: the smallest weight to keep is found by bisection.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature)
    if 0 < top_k < weights.shape[-1]:
        weights = jnp.where(weights >= _least_of_likeliest(weights, top_k), weights, 0.0)
    if top_p < 1:
        weights = jnp.where(weights >= _least_in_nucleus(weights, top_p), weights, 0.0)
    if min_p > 0:
        weights = jnp.where(weights >= min_p, weights, 0.0)  # the likeliest token has weight 1
    sums = jnp.cumsum(weights, axis=-1)
    # sums may differ by rounding even where a weight is 0: a token without weight is never drawn
    is_reached = (sums > uniforms[:, None] * sums[:, -1:]) & (weights > 0)
    drawn = jnp.where(jnp.any(is_reached, axis=-1), jnp.argmax(is_reached, axis=-1), jnp.argmax(weights, axis=-1))
    return drawn.astype(jnp.int32)


def penalized(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Logits [B, n_vocab] in which the tokens that a row has `seen`, bool [B, n_vocab], are less likely.

    Keskar et al., arXiv 1909.05858, section 4.1, divide the logits by the penalty. Dividing a negative logit would make
    the token more likely, so it is multiplied instead, as in other implementations.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _least_in_nucleus(weights: jax.Array, top_p: float) -> jax.Array:
    """The greatest t, float32 [B, 1], such that weights [B, n] of at least t have a share of `top_p`."""
    wanted = top_p * jnp.sum(weights, axis=-1)
    return _greatest(weights, lambda least: jnp.sum(jnp.where(weights >= least, weights, 0.0), axis=-1) >= wanted)


def _least_of_likeliest(weights: jax.Array, top_k: int) -> jax.Array:
    """The greatest t, float32 [B, 1], such that top_k of the weights [B, n] are at least t."""
    return _greatest(weights, lambda least: jnp.sum(weights >= least, axis=-1) >= top_k)


def _greatest(weights: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The greatest t in 0 .. 1, float32 [B, 1], for which is_enough(t), bool [B], is true, as it is for all smaller t.
    In this range floats are ordered like their bits. weights: [B, n], for B."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high + 1) // 2
        enough = is_enough(jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.zeros(len(weights), jnp.int32)
    high = jnp.full_like(low, jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32))
    low, _ = jax.lax.fori_loop(0, _SEARCH_STEPS, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]
