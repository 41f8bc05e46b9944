"""How the codebooks move: an optax transformation, so that `optax.apply_updates` moves them with the weights.

Codes follow an exponential moving average (EMA) of the keys that chose them (Transformer-VQ, arXiv 2309.16354, section
3.4; van den Oord et al., arXiv 1711.00937, appendix A.1):

    N_s <- g N_s + (1 - g) n_s
    c_s <- (g N_s c_s + (1 - g) sum of the keys with shortcode s) / N_s

with n_s the number of keys of the update, over the whole global batch, whose shortcode is s, and g = `c_gamma`.
A code with n_s = 0 keeps its place exactly. The sums stand in the gradient's tree, at the codebook's own place (see
vq.py), if `l_codebook` is part of the loss. An optimizer for a model that has VQAttention somewhere in it:

    optax.multi_transform({WEIGHTS: optax.adamw(1e-3), CODEBOOK: codebook_average(config.c_gamma)}, optimizer_labels)

Clipping and weight decay belong inside the transformation for the weights. The sums are not gradients, and are far
larger: a global norm of both would be that of the sums.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

WEIGHTS, CODEBOOK = "weights", "codebook"  # what `optimizer_labels` returns

# A code whose moving average is below this has not been used for hundreds of updates.
DEAD_COUNT = 1e-2
# An unused code's N_s shrinks by g each update; c_s is divided by no less than this, or it would be divided by zero.
MIN_COUNT = 1e-6


def ema_update(quantizer_params: Mapping, sums: Mapping, gamma: float) -> dict:
    """One step of the codebook's moving average, new minus old; the equations are at the head of this file.

    quantizer_params: codebook [..., S, K] and count [..., S], float32; leading axes are heads, layers.
    sums: the gradient of `l_codebook`: sum of keys per code under "codebook", number of keys under "count".
    Returns what to add to the codebook and to the count, in a dict like quantizer_params. Where n_s is 0 the codebook's
    step is exactly 0. In float32, old + (new - old) is the new count exactly while a count at most doubles and at most
    halves; beyond, it may differ by a rounding error (of the old count: a tiny one may become 0).
    """
    codebook, count = quantizer_params["codebook"], quantizer_params["count"]
    key_sums, n = sums["codebook"], sums["count"]
    new_count = jnp.maximum(gamma * count + (1.0 - gamma) * n, MIN_COUNT)
    # Written as a step from the old place, and not as the new place minus the old: so nothing of it is rounded away.
    step = (1.0 - gamma) * (key_sums - n[..., None] * codebook) / new_count[..., None]
    return dict(codebook=step, count=new_count - count)


def codebook_average(gamma: float) -> optax.GradientTransformation:
    """Returns the transformation of every quantizer's leaves: sums in, `ema_update` out. It keeps no state.

    gamma: decay of the average, per update. The transformation takes trees of quantizers alone, which is what
    `optax.multi_transform` gives it; `update` needs the parameters, and raises ValueError without them, or if there are
    leaves that are not a quantizer's.
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("codebook_average: the moving average starts from the parameters; give them to update()")

        def of_quantizer(sums, quantizer_params):
            if not _is_quantizer(sums):
                raise ValueError(
                    "codebook_average: was given weights too; combine it with the weights' optimizer by "
                    "optax.multi_transform and optimizer_labels"
                )
            return ema_update(quantizer_params, sums, gamma)

        return jax.tree.map(of_quantizer, updates, params, is_leaf=_is_quantizer), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def optimizer_labels(params: optax.Params) -> optax.Params:
    """Returns a tree like params, with CODEBOOK for the leaves of quantizers and WEIGHTS for all others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: CODEBOOK if is_codebook(path) else WEIGHTS, params)


def _is_quantizer(tree) -> bool:
    return isinstance(tree, dict) and tree.keys() == {"codebook", "count"}


def is_codebook(path: tuple) -> bool:
    """Whether a path in the parameters' tree (of jax.tree_util keys) leads into a quantizer, whose parameters follow
    their moving average and have no gradient that an optimizer could follow."""
    return any(getattr(key, "key", None) == "quantizer" for key in path)


def codebook_counts(tree: dict) -> jax.Array | None:
    """The leaves "count" of every quantizer, float32 [units, H, S], the model's units in order; None if there is no
    quantizer. tree: parameters (moving averages), or gradients (keys of each code in this update; see nn/vq.py)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    counts = [leaf for path, leaf in leaves if is_codebook(path) and getattr(path[-1], "key", None) == "count"]
    if not counts:
        return None
    by_layer = jnp.stack(counts, axis=1)  # each [n_layer, H, S]
    return by_layer.reshape(-1, *by_layer.shape[2:])
