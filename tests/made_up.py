"""Trainings without a model's cost: a step that is quick to compile, and a first state that is compiled once.

For tests of what is around the step: going back, checkpoints, evaluations. They put these in place of
`make_train_step` and `create_train_state`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tvq_pod.config.settings import Settings
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.training import bad_steps, digest
from tvq_pod.training.step import TrainState, abstract_train_state, create_train_state


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
        rolled = digest.roll(state.digest, batch)
        metrics |= dict(n_bad=known["n_bad"], digest=rolled)
        return TrainState(state.step + 1, params, opt_state, recurrent, known, rolled), metrics

    return step


def first_state(settings: Settings, mesh: jax.sharding.Mesh) -> TrainState:
    """What create_train_state makes."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh))
    only = Settings(seed=settings.seed, model=settings.model, optimizer=settings.optimizer, mesh=settings.mesh)
    rows = dataclasses.replace(only.train, batch_size=settings.train.batch_size)
    return jax.device_put(_first_state(dataclasses.replace(only, train=rows)), shardings)


@functools.cache
def _first_state(settings: Settings) -> TrainState:
    return jax.device_get(create_train_state(settings, make_mesh(settings.mesh)))
