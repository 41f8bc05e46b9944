"""Trainings without a model's cost: a step that is quick to compile, and a first state that is quick to make.

For tests of what is around the step: going back, checkpoints, evaluations. They put these in place of
`compiled_train_step` and `create_train_state`.
"""

import functools

import jax
import jax.numpy as jnp

from tests.common import model_params
from tvq_pod.config.settings import Settings
from tvq_pod.data import digest
from tvq_pod.training import bad_steps, ema
from tvq_pod.training.step import TrainState, abstract_train_state, initial_recurrent


@functools.cache
def made_up_step(settings: Settings, mesh: jax.sharding.Mesh):
    """Parameters and states follow the tokens. What is bad is judged, counted and left out as by the real step."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state, batch):
        loss = jnp.mean(batch["loss_mask"] * (1.0 + batch["targets"] / settings.model.n_vocab))
        metrics = dict(loss=loss, l_commit=loss, grad_norm=loss)
        good, known = bad_steps.judge(state.bad_steps, metrics, [], settings.bad_steps)
        before = state.params, state.opt_state, state.recurrent
        moved = jax.tree.map(lambda x: (0.9 * x + 1000 * loss).astype(x.dtype), before)
        params, opt_state, recurrent = bad_steps.choose(good, moved, before)
        average = state.ema
        if average is not None:
            decay = ema.decay_after(state.step, settings.train.ema_decay)
            average = bad_steps.choose(good, ema.moved(average, params, decay), average)
        rolled = digest.roll(state.digest, batch)
        metrics |= dict(n_bad=known["n_bad"], digest=rolled)
        return TrainState(state.step + 1, params, opt_state, recurrent, known, rolled, average), metrics

    return step


def first_state(settings: Settings, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step; its parameters are those of `model_params`."""
    return _first_state(settings, mesh)(model_params(settings.model))


@functools.cache
def _first_state(settings: Settings, mesh: jax.sharding.Mesh):
    abstract = abstract_train_state(settings, mesh)

    def state_with(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=jax.tree.map(jnp.copy, params),  # a step may donate them
            opt_state=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.opt_state),
            recurrent=initial_recurrent(settings),
            bad_steps=bad_steps.start(),
            digest=digest.start(),
            ema=ema.start(params) if settings.train.ema_decay else None,
        )

    return jax.jit(state_with, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
