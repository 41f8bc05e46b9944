"""Drawing a token from what a model says of it."""

import jax
import jax.numpy as jnp

from tvq_pod.nn.scores import NEVER


def draw_token(logits: jax.Array, key: jax.Array, *, temperature: float, nucleus_p: float) -> jax.Array:
    """One token id, int32 scalar, from logits [n_vocab], of the likeliest tokens that have probability `nucleus_p`
    together (Holtzman et al., arXiv 1904.09751); temperature 0 takes the likeliest."""
    if temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = logits / temperature
    if nucleus_p < 1:
        descending = jnp.sort(logits)[::-1]
        probs = jax.nn.softmax(descending)
        # a token stays if those before it do not fill the nucleus; the first always stays
        n_kept = jnp.sum(jnp.cumsum(probs) - probs < nucleus_p)
        logits = jnp.where(logits >= descending[n_kept - 1], logits, NEVER)
    return jax.random.categorical(key, logits).astype(jnp.int32)
