"""The moving average of the weights that evaluations and samples use (config.train.ema_decay).

It is part of the train state and of the checkpoints, float32, a tree like the parameters, and sharded like them. With
w_t the parameters after step t and d = config.train.ema_decay,

    a_t = d_t a_(t - 1) + (1 - d_t) w_t,    d_t = min(d, (1 + t) / (10 + t))

so an average never spans much more than the last tenth of a run, and the random initial weights soon drop out. (The
limit is that of tf.train.ExponentialMovingAverage.)

Codebooks are averaged too. In training a code is the mean of the keys of about the last 1 / (1 - c_gamma) updates. It
lags that far behind the weights, and the model has learned with codes that lag. With the same average, codes and
weights stay that far apart. The codes of the last step would instead be ahead of the averaged weights by up to
1 / (1 - d) steps.

An average of positions alone would leave a code that was revived (see nn/codebook.py) halfway between its old position
and its new one. So a position is weighted by its count: with N the count and c the position of a code, the average of
N c over the average of N is the mean of the keys that the code stood for, and a position that no key chose has no
weight. This is the codebook's own moving average applied again, with decay d_t.
"""

import jax
import jax.numpy as jnp

from tvq_pod.nn.codebook import ema_update, is_quantizer


def start(params: dict) -> dict:
    """Returns the average that begins with `params`: a float32 copy, since no array may be in a train state twice."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)


def decay_after(step: jax.Array, decay: float) -> jax.Array:
    """Returns d_t of the step after `step` (int32) others, float32."""
    t = step.astype(jnp.float32) + 1.0
    return jnp.minimum(decay, (1.0 + t) / (10.0 + t))


def moved(average: dict, params: dict, decay: jax.Array) -> dict:
    """Returns the average after a step that resulted in `params`. decay: d_t."""

    def of_weight(mean, new):
        return mean + (1.0 - decay) * (new.astype(jnp.float32) - mean)

    def of_part(mean, new):
        if not is_quantizer(mean):
            return of_weight(mean, new)
        keys = dict(codebook=new["codebook"] * new["count"][..., None], count=new["count"])
        return jax.tree.map(jnp.add, mean, ema_update(mean, keys, decay))

    return jax.tree.map(of_part, average, params, is_leaf=is_quantizer)


def as_parameters(average: dict, params: dict) -> dict:
    """Returns the average in the dtypes of `params`, as a model takes it. Arrays that already have them are not
    copied."""
    return jax.tree.map(lambda mean, like: mean.astype(like.dtype), average, params)
