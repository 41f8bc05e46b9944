"""Norms by layer, of gradients and weights, and how far a step moves the weights.

The compiled step computes them every `config.train.detail_every_steps` steps, in a separate branch. They cost other
steps nothing: the branch only reads arrays that exist anyway, and it computes the optimizer's updates a second time
instead of having every step keep them. With the branch, the compiler may round some numbers of a step differently.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tvq_pod.nn.codebook import is_codebook
from tvq_pod.nn.model import is_stacked

DETAIL = "detail"  # the metric's name


def detail(grads: dict, params: dict, updates: dict) -> dict[str, jax.Array]:
    """Returns grad_norm_NAME, param_norm_NAME and update_ratio_NAME, float32, for each NAME of the parameters' tree:
    [n_layer] for `layers`, and a scalar for others, such as the embedding.

    grads: before clipping. params: before the step. updates: what the step adds to params, including learning rate and
    weight decay; update_ratio is their norm over the norm of params. Codebooks, which have no gradient, are left out.
    """
    of_grads, of_params, of_updates = (_norms(tree) for tree in (grads, params, updates))
    ratios = {name: of_updates[name] / jnp.maximum(norm, 1e-30) for name, norm in of_params.items()}
    named = dict(grad_norm=of_grads, param_norm=of_params, update_ratio=ratios)
    return {f"{kind}_{name}": value for kind, values in named.items() for name, value in values.items()}


def at_some_steps(step: jax.Array, every_steps: int, compute: Callable[[], dict[str, jax.Array]]) -> dict[str, Any]:
    """Returns the result of `compute` as the metric `detail` if `step` is a multiple of every_steps, otherwise zeros.
    If every_steps is 0, there is no such metric."""
    if not every_steps:
        return {}
    shapes = jax.eval_shape(compute)

    def zeros():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return {DETAIL: jax.lax.cond(step % every_steps == 0, compute, zeros)}


def _norms(tree: dict) -> dict[str, jax.Array]:
    sums: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if is_codebook(path):
            continue
        own_axes = tuple(range(1 if is_stacked(path) else 0, leaf.ndim))
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)), own_axes)
        name = path[0].key
        sums[name] = sums[name] + square if name in sums else square
    return {name: jnp.sqrt(square) for name, square in sums.items()}
