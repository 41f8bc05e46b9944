"""Deciding whether a step may be applied, inside the compiled step, so that every process decides the same.

A step is bad if its loss or gradient is not finite, if its loss is further above the mean of earlier steps than their
deviation allows, or if a codebook has collapsed. A bad step is not applied: weights, optimizer, codebook and recurrent
state stay as they were, as if the step had had no data; with config.bad_steps.forget_state, states start empty.
run/rollback.py handles several bad steps in a row.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from tvq_pod.config.settings import BadStepsSettings

MEMORY = 0.01  # weight of the newest loss in mean and variance, once there are 1 / MEMORY losses
LEAST_DEVIATION = 0.01  # a share of the mean: if losses hardly vary, not every change is a spike


def start() -> dict:
    """Returns the state before the first step: loss_mean and loss_var, float32, of n_losses, int32; n_bad, int32, the
    number of bad steps in a row."""
    zero, none = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32)
    return dict(loss_mean=zero, loss_var=zero, n_losses=none, n_bad=none)


def judge(before: dict, metrics: dict, sums: Sequence[jax.typing.ArrayLike], settings: BadStepsSettings):
    """Returns whether a step is good, a bool scalar, and the next `before`.

    before: see `start`. metrics: the step's loss, l_commit, grad_norm, which is finite only if all gradients are, and
    those of `code_report` if there are codebooks. sums: the codebooks' sums (see nn/vq.py).
    """
    loss = metrics["loss"]
    good = jnp.isfinite(loss) & jnp.isfinite(metrics["l_commit"]) & jnp.isfinite(metrics["grad_norm"])
    for array in sums:
        good &= jnp.all(jnp.isfinite(array))
    if sums:
        good &= jnp.all(jnp.isfinite(metrics["code_count_max"]))
        good &= jnp.min(metrics["code_perplexity"]) >= settings.min_code_perplexity
        good &= jnp.max(metrics["dead_codes"]) <= settings.max_dead_codes
    if settings.spike_deviations:
        deviation = jnp.maximum(jnp.sqrt(before["loss_var"]), LEAST_DEVIATION * before["loss_mean"])
        known = before["n_losses"] >= settings.spike_after_steps
        good &= ~known | (loss <= before["loss_mean"] + settings.spike_deviations * deviation)
    share = jnp.maximum(1.0 / (before["n_losses"] + 1.0), MEMORY)
    step = loss - before["loss_mean"]
    after = dict(
        loss_mean=before["loss_mean"] + share * step,
        loss_var=(1.0 - share) * (before["loss_var"] + share * step * step),
        n_losses=before["n_losses"] + 1,
        n_bad=jnp.zeros_like(before["n_bad"]),
    )
    return good, choose(good, after, before | dict(n_bad=before["n_bad"] + 1))


def choose(good: jax.Array, new, old):
    """Returns the new tree if the step is good, otherwise the old one."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def choose_stacks(good: jax.Array, new: dict, old: dict) -> dict:
    """Returns what `choose` returns, for trees of arrays that all have a leading axis of layers.

    `choose` reads both trees and writes a third one in every step, good or bad, which takes time if the arrays are
    large. This is a loop that copies the layers of `old` over those of `new`, in place. After a good step it has no
    iterations, and `new` is not touched.
    """
    n_layer = len(jax.tree.leaves(new)[0])

    def copy_layer(carry):
        left, states = carry
        layer = left + n_layer

        def copied(state, before):
            before = lax.dynamic_index_in_dim(before, layer, keepdims=False)
            return lax.dynamic_update_index_in_dim(state, before, layer, axis=0)

        return left + 1, jax.tree.map(copied, states, old)

    # Counts up to 0: --mode=plan takes the limit for the number of iterations, so it plans a good step.
    first = jnp.where(good, 0, -n_layer)
    return lax.while_loop(lambda carry: carry[0] < 0, copy_layer, (first, new))[1]
