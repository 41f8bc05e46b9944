"""The codebooks' update: an optax transformation, so that `optax.apply_updates` moves them along with the weights.

Codes follow an exponential moving average (EMA) of the keys that chose them (Transformer-VQ, arXiv 2309.16354, section
3.4; van den Oord et al., arXiv 1711.00937, appendix A.1):

    N_s <- g N_s + (1 - g) n_s
    c_s <- (g N_s c_s + (1 - g) sum of the keys with shortcode s) / N_s

with n_s the number of keys of the update, over the complete global batch, whose shortcode is s, and g = `c_gamma`.
A code with n_s = 0 does not move at all, unless `revive` moves it. The sums are in the gradient's tree, in the
codebook's place (see vq.py), if `l_codebook` is part of the loss. An optimizer for a model that contains VQAttention:

    codes = codebook_average(config.c_gamma, config.c_revive)
    optax.multi_transform({WEIGHTS: optax.adamw(1e-3), CODEBOOK: codes}, optimizer_labels)

Clipping and weight decay belong inside the transformation for the weights. The sums are not gradients, and are far
larger: they would dominate a global norm of both.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

WEIGHTS, CODEBOOK = "weights", "codebook"  # the labels of `optimizer_labels`

# A code whose moving average is below this has not been used for hundreds of updates.
DEAD_COUNT = 1e-2
# An unused code's N_s shrinks by g in each update; the divisor of c_s is at least this, to avoid a division by zero.
MIN_COUNT = 1e-6


def ema_update(quantizer_params: Mapping, sums: Mapping, gamma: float | jax.Array) -> dict:
    """Computes one step of the codebook's moving average, new minus old; the equations are at the head of this file.

    quantizer_params: codebook [..., S, K] and count [..., S], float32; leading axes are heads, layers.
    sums: the gradient of `l_codebook`: sum of keys per code under "codebook", number of keys under "count".
    Returns what to add to the codebook and to the count, in a dict like quantizer_params. Where n_s is 0 the codebook's
    step is exactly 0. In float32, old + (new - old) is exactly the new count as long as a count changes by at most a
    factor of two; otherwise, it may differ by a rounding error (relative to the old count: a tiny count may become 0).
    """
    codebook, count = quantizer_params["codebook"], quantizer_params["count"]
    key_sums, n = sums["codebook"], sums["count"]
    new_count = ema_count(count, n, gamma)
    # Computed as a step from the old place, not as the new place minus the old, so that it does not lose precision.
    step = (1.0 - gamma) * (key_sums - n[..., None] * codebook) / new_count[..., None]
    return dict(codebook=step, count=new_count - count)


def ema_count(count: jax.Array, n: jax.Array, gamma: float | jax.Array) -> jax.Array:
    """The moving average N of `ema_update` after an update with n keys of each code, float32 [..., S]."""
    return jnp.maximum(gamma * count + (1.0 - gamma) * n, MIN_COUNT)


def revive(quantizer_params: Mapping, step: Mapping, share: float) -> dict:
    """Moves each dead code next to a code that stands for too many keys, so that the two share them: the splitting of
    Linde, Buzo & Gray (IEEE Transactions on Communications, 1980).

    quantizer_params: codebook [..., S, K] and count [..., S], float32; leading axes are heads, layers. step: what an
    update adds to them (see `ema_update`). share: a code is dead if its new count is below this share of the mean over
    its head's codes. Returns the step including the moves. Other codes' steps are unchanged, bit for bit.

    Keys have squared norm sqrt(K), and a code is the mean of its keys, so sqrt(K) - |c|^2 is their mean squared
    distance from it, and N (sqrt(K) - |c|^2) is the cost of quantizing them. The dead code with the lowest count goes
    to the code with the highest cost, the next to the next, until no code is left to split. It lands one standard
    deviation (along one axis) away from that code, on its own side of it, and takes half of its count. Nothing is
    random or depends on the mesh.
    """
    codebook, count = (quantizer_params[name] + step[name] for name in ("codebook", "count"))
    d_k = codebook.shape[-1]
    dead = count < share * jnp.mean(count, axis=-1, keepdims=True)
    spread = jnp.maximum(d_k**0.5 - jnp.sum(jnp.square(codebook), axis=-1), 0.0)
    by_cost = jnp.argsort(jnp.where(dead, -1.0, count * spread), axis=-1, descending=True)
    rank = _ranks(jnp.argsort(jnp.where(dead, count, jnp.inf), axis=-1))
    n_moved = n_revived(count, share)[..., None]
    moves, divided = rank < n_moved, _ranks(by_cost) < n_moved
    source = jnp.take_along_axis(by_cost, rank, axis=-1)  # for each code, if it moves

    place = jnp.take_along_axis(codebook, source[..., None], axis=-2)
    side = codebook - place
    side /= jnp.maximum(jnp.linalg.norm(side, axis=-1, keepdims=True), 1e-6)
    place += side * jnp.sqrt(jnp.take_along_axis(spread, source, axis=-1) / d_k)[..., None]
    halves = 0.5 * jnp.where(moves, jnp.take_along_axis(count, source, axis=-1), count)
    return dict(
        codebook=jnp.where(moves[..., None], place - quantizer_params["codebook"], step["codebook"]),
        count=jnp.where(moves | divided, halves - quantizer_params["count"], step["count"]),
    )


def n_revived(count: jax.Array, share: float) -> jax.Array:
    """The number of codes that `revive` moves, int32 [...], given the new counts [..., S]."""
    dead = count < share * jnp.mean(count, axis=-1, keepdims=True)
    n_dead = jnp.sum(dead, axis=-1)
    return jnp.minimum(n_dead, count.shape[-1] - n_dead)


def _ranks(order: jax.Array) -> jax.Array:
    """The inverse of a permutation along the last axis."""
    return jnp.argsort(order, axis=-1)


def codebook_average(gamma: float, revive_below: float = 0.0) -> optax.GradientTransformation:
    """Returns the transformation of every quantizer's leaves: sums in, `ema_update` out. It keeps no state.

    gamma: decay of the average, per update. revive_below: share of the mean count below which `revive` moves a code; 0:
    none is moved. The transformation accepts only trees of quantizers, as `optax.multi_transform` passes them; `update`
    needs the parameters, and raises ValueError without them, or if there are leaves that are not a quantizer's.
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("codebook_average: the moving average starts from the parameters; give them to update()")

        def of_quantizer(sums, quantizer_params):
            if not is_quantizer(sums):
                raise ValueError(
                    "codebook_average: was given weights too; combine it with the weights' optimizer by "
                    "optax.multi_transform and optimizer_labels"
                )
            step = ema_update(quantizer_params, sums, gamma)
            return revive(quantizer_params, step, revive_below) if revive_below else step

        return jax.tree.map(of_quantizer, updates, params, is_leaf=is_quantizer), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def optimizer_labels(params: optax.Params) -> optax.Params:
    """Returns a tree like params, with CODEBOOK for the leaves of quantizers and WEIGHTS for all others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: CODEBOOK if is_codebook(path) else WEIGHTS, params)


def is_quantizer(tree) -> bool:
    """Whether a tree has the parameters of one quantizer, or their counterparts in a tree of the same structure."""
    return isinstance(tree, dict) and tree.keys() == {"codebook", "count"}


def is_codebook(path: tuple) -> bool:
    """Whether a path in the parameters' tree (of jax.tree_util keys) leads into a quantizer, whose parameters follow a
    moving average and have no gradient for an optimizer."""
    return any(getattr(key, "key", None) == "quantizer" for key in path)


def codebook_counts(tree: dict) -> jax.Array | None:
    """The leaves "count" of all quantizers, float32 [units, H, S], in the order of the model's units; None if there is
    no quantizer. tree: parameters (moving averages), or gradients (keys of each code in this update; see nn/vq.py)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    counts = [leaf for path, leaf in leaves if is_codebook(path) and getattr(path[-1], "key", None) == "count"]
    if not counts:
        return None
    by_layer = jnp.stack(counts, axis=1)  # each [n_layer, H, S]
    return by_layer.reshape(-1, *by_layer.shape[2:])
