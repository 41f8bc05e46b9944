"""The state of training, its sharding over the mesh, and the one function that advances it.

`step` counts updates that have been consumed: a state with step n has consumed updates 0 .. n - 1 of every stream.
"""

import dataclasses
import functools
import time
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tvq_pod.config.settings import Settings
from tvq_pod.data import digest
from tvq_pod.host.terminal import say
from tvq_pod.nn.axes import placed_by
from tvq_pod.nn.codebook import DEAD_COUNT, codebook_counts, ema_count, is_codebook, n_revived
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig, VQSpec
from tvq_pod.nn.vq import code_metrics
from tvq_pod.parallel.attention import attention_line
from tvq_pod.parallel.mesh import compiler_options
from tvq_pod.parallel.sharding import (
    OnMesh,
    batch_sharding,
    param_shardings,
    replicated,
    shardings_of,
)
from tvq_pod.training import bad_steps, ema
from tvq_pod.training.detail import at_some_steps, detail
from tvq_pod.training.optimizer import make_optimizer, schedule, steps_of_schedule


class TrainState(flax.struct.PyTreeNode):
    """The state of training. step: int32 scalar. params: the model's, including codebooks. opt_state: the optimizer's.
    recurrent: the state of every layer for all B streams (see Transformer.initial_state).
    bad_steps: statistics of earlier steps (see bad_steps.start). digest: of all tokens consumed, uint32 [2].
    ema: the moving average of params, float32 (see ema.py); None if the run keeps none."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    recurrent: dict
    bad_steps: dict
    digest: jax.Array
    ema: dict | None = None


def initial_params(settings: Settings):
    """Returns parameters drawn from the seed, in boxes with the logical names of their axes."""
    config = settings.model.replace(is_train=False)
    state = Transformer.initial_state(config, 1)
    tokens = jnp.zeros((1, config.block_len), jnp.int32)
    return Transformer(config).init(jax.random.key(settings.seed), state, tokens, tokens)["params"]


def initial_train_state(settings: Settings) -> TrainState:
    """Returns the state before the first step."""
    return _train_state_of(nn.meta.unbox(initial_params(settings)), settings)


def _train_state_of(params: dict, settings: Settings) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=_optimizer_of(settings).init(params),
        recurrent=initial_recurrent(settings),
        bad_steps=bad_steps.start(),
        digest=digest.start(),
        ema=ema.start(params) if settings.train.ema_decay else None,
    )


def _optimizer_of(settings: Settings) -> optax.GradientTransformation:
    model = settings.model
    return make_optimizer(settings.optimizer, settings.train.num_steps, model.c_gamma, model.c_revive)


def initial_recurrent(settings: Settings) -> dict:
    """Returns the recurrent state of streams that have read nothing."""
    return Transformer.initial_state(settings.model, settings.train.batch_size)


@functools.lru_cache(maxsize=4)  # it traces the model, which takes seconds
def abstract_train_state(settings: Settings, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the train state as ShapeDtypeStructs with shardings, without computing or allocating anything.

    An optimizer's array with the shape of its parameter is sharded like the parameter; others are replicated.
    """
    boxed = jax.eval_shape(lambda: initial_params(settings))
    shapes = jax.eval_shape(lambda params: _train_state_of(params, settings), nn.meta.unbox(boxed))
    on_params = param_shardings(boxed, mesh, settings.mesh.fsdp)
    everywhere = replicated(mesh)
    shardings = shapes.replace(
        step=everywhere,
        params=on_params,
        opt_state=_like_params(shapes.opt_state, shapes.params, on_params, everywhere),
        recurrent=shardings_of(Transformer.state_axes(settings.model), shapes.recurrent, mesh),
        bad_steps=jax.tree.map(lambda _: everywhere, shapes.bad_steps),
        digest=everywhere,
        ema=on_params if settings.train.ema_decay else None,
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _like_params(opt_state, params, on_params, everywhere):
    """Returns shardings for an optimizer's state, which contains trees with the paths of the parameters."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(on_params))
    shape_by_path = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path, leaf):
        for begin in range(len(path)):
            if shape_by_path.get(path[begin:]) == leaf.shape:
                return by_path[path[begin:]]
        return everywhere

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def create_train_state(settings: Settings, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state before the first step, made in place: no host or device ever holds more than its share."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh))
    return jax.jit(lambda: initial_train_state(settings), out_shardings=shardings)()


def train_state_with(params: dict, settings: Settings, mesh: jax.sharding.Mesh) -> TrainState:
    """`create_train_state` with other parameters than the seed's. params: a tree of arrays like the model's, including
    codebooks."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh))
    params = jax.device_put(params, shardings.params)
    return jax.jit(lambda params: _train_state_of(params, settings), out_shardings=shardings)(params)


def create_recurrent(settings: Settings, mesh: jax.sharding.Mesh) -> dict:
    """`initial_recurrent`, made in place."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh).recurrent)
    return jax.jit(lambda: initial_recurrent(settings), out_shardings=shardings)()


def weights_in_use(state: TrainState) -> dict:
    """Returns the parameters for evaluations and samples: their moving average, in their dtypes, if there is one."""
    return state.params if state.ema is None else ema.as_parameters(state.ema, state.params)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A step: (TrainState, batch) -> (TrainState, metrics). The arrays of the given TrainState are deleted.

    program: the function of a TrainState without its recurrent state, the recurrent state, and a batch. The first is
    donated: the program overwrites it with its result. The recurrent state has to stay unchanged until the step is
    known to be good. So the next one has its own memory, layers write to it directly, and a good step copies nothing.
    With config.bad_steps.forget_state, the previous state is not needed, so it is donated too.
    """

    program: jax.stages.Wrapped | jax.stages.Compiled

    def __call__(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """Returns the next state and metrics while they are still being computed."""
        made = self.program(*_split(state), batch)
        for array in jax.tree.leaves(state.recurrent):
            array.delete()  # once the program has read it
        return made

    def as_text(self) -> str:
        """Returns the text of a compiled program."""
        assert isinstance(self.program, jax.stages.Compiled)
        return self.program.as_text() or ""

    def lower(self, state: TrainState, batch: dict) -> jax.stages.Lowered:
        """Lowers a program that is not compiled yet, for arrays or ShapeDtypeStructs."""
        assert not isinstance(self.program, jax.stages.Compiled)
        return self.program.lower(*_split(state), batch)


def _split(state: TrainState) -> tuple[TrainState, dict]:
    return state.replace(recurrent={}), state.recurrent


def make_train_step(settings: Settings, mesh: jax.sharding.Mesh) -> TrainStep:
    """Returns the step, which is compiled when it is first called.

    batch: see `Feed.batches`. metrics: float32 scalars: loss (nats per token, of the predictions alone), l_commit,
    z_loss (if the loss has it: mean of log(Z)^2), grad_norm, learning_rate; those of `code_report` and
    `revival_report`; n_bad, int32: the number of bad steps in a row up to this one, which are not applied (see
    bad_steps.py); digest, uint32 [2]; detail, with config.train.detail_every_steps: a dict (see detail.py).
    """
    optimizer = _optimizer_of(settings)
    share = schedule(settings.optimizer, settings.train.num_steps)
    gradients = make_gradients(settings)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(settings, mesh))
    forgets, ema_decay = settings.bad_steps.forget_state, settings.train.ema_decay

    def train_step(state: TrainState, recurrent: dict, batch: dict):
        # Masks are a function of (seed, step): a resumed run draws the same ones as a run that never stopped.
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        with placed_by(OnMesh(mesh, settings.mesh.fsdp)):
            grads, next_recurrent, metrics = gradients(state.params, recurrent, batch, key)
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = cast(dict, optax.apply_updates(state.params, updates))
        with jax.named_scope("metrics"):
            metrics |= code_report(grads, params) | revival_report(grads, state.params, settings.model)
            metrics["grad_norm"] = grad_norm(grads)
            metrics["learning_rate"] = settings.optimizer.learning_rate * share(steps_of_schedule(state.opt_state))
        with jax.named_scope("bad_steps"):
            good, known = bad_steps.judge(state.bad_steps, metrics, codebook_sums(grads), settings.bad_steps)
            params, opt_state = bad_steps.choose(good, (params, opt_state), (state.params, state.opt_state))
        average = state.ema
        if average is not None:
            with jax.named_scope("ema"):
                moved = ema.moved(average, params, ema.decay_after(state.step, ema_decay))
                average = bad_steps.choose(good, moved, average)
        with jax.named_scope("bad_steps"):
            if forgets:
                recurrent = bad_steps.choose(good, next_recurrent, initial_recurrent(settings))
            else:
                recurrent = bad_steps.choose_stacks(good, next_recurrent, recurrent)
        with jax.named_scope("digest"):
            rolled = digest.roll(state.digest, batch)
        metrics |= dict(n_bad=known["n_bad"], digest=rolled)

        def computed_detail():  # computes the updates a second time: see detail.py
            again, _ = optimizer.update(grads, state.opt_state, state.params)
            return detail(grads, state.params, cast(dict, again))

        metrics |= at_some_steps(state.step + 1, settings.train.detail_every_steps, computed_detail)
        return TrainState(state.step + 1, params, opt_state, recurrent, known, rolled, average), metrics

    program = jax.jit(
        train_step,
        in_shardings=(*_split(shardings), batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=(0, 1) if forgets else 0,
        compiler_options=compiler_options(mesh),
    )
    return TrainStep(program)


def make_gradients(settings: Settings):
    """Returns the function (params, recurrent, batch, key) -> (gradients, next recurrent, dict of loss and l_commit,
    and of z_loss if config.train.z_loss gives it a weight).

    Microbatches are processed one after the other: each has its part of the rows and of their states, and gradients,
    including the codebooks' sums, are added up.
    """
    config = settings.model.replace(is_train=True)
    n_parts, z_weight = settings.train.microbatches, settings.train.z_loss

    def loss_fn(params, recurrent, batch, n_positions, rngs):
        mask = batch["loss_mask"]
        tokens = batch["inputs"], batch["doc_ids"], VQSpec(mask, n_positions), batch["targets"]
        applied = Transformer(config).apply({"params": params}, recurrent, *tokens, bool(z_weight), rngs=rngs)
        new_recurrent, out = cast(tuple[dict, dict], applied)

        def mean(of_tokens):
            return jnp.sum(of_tokens * mask) / jnp.maximum(n_positions, 1.0)

        metrics = dict(loss=mean(out["losses"]), l_commit=out["l_commit"])
        # l_codebook is 0: its gradient carries the codebook's sums (see nn/vq.py)
        total = metrics["loss"] + config.c_beta * out["l_commit"] + out["l_codebook"]
        if z_weight:
            metrics["z_loss"] = mean(jnp.square(out["log_z"]))
            total += z_weight * metrics["z_loss"]
        return total, (new_recurrent, metrics)

    def gradients(params, recurrent, batch, key):
        n_positions = jnp.sum(batch["loss_mask"])

        def of_part(recurrent, batch, key):
            rngs = dict(zip(("ephemeral", "timeless"), jax.random.split(key), strict=True))
            grads, (recurrent, metrics) = jax.grad(loss_fn, has_aux=True)(params, recurrent, batch, n_positions, rngs)
            return (grads, metrics), recurrent

        if n_parts == 1:
            sums, recurrent = of_part(recurrent, batch, key)
        else:

            def add(sums, part):
                own, recurrent = of_part(*part)
                return jax.tree.map(jnp.add, sums, own), recurrent

            # Sums are float32 for parameters of any dtype: small parts must not be lost in a large sum.
            zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
            names = ("loss", "l_commit", *(["z_loss"] if z_weight else []))
            zeros = zeros, dict.fromkeys(names, jnp.zeros([]))
            parts = _parts(recurrent, 1, n_parts), _parts(batch, 0, n_parts), jax.random.split(key, n_parts)
            sums, recurrent = jax.lax.scan(add, zeros, parts)
            recurrent = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:]), recurrent)
        grads, metrics = sums
        grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)
        return grads, recurrent, metrics

    return gradients


def _parts(tree, axis: int, n_parts: int):
    """Splits [.., B, ..] into [A, .., B / A, ..]; part a has the rows b with b % A == a, so devices keep their rows."""

    def parts(x):
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, n_parts, *x.shape[axis + 1 :]), axis + 1, 0)

    return jax.tree.map(parts, tree)


def codebook_sums(grads: dict) -> list[jax.Array]:
    """Returns the codebooks' sums from the gradients' tree."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if is_codebook(path)]


def code_report(grads: dict, params: dict) -> dict:
    """Returns statistics of the codebooks for every unit: code_perplexity (exp of the entropy of the codes' use in this
    update, 1 .. S), code_usage (share of codes used in it), dead_codes (share whose moving average is almost zero),
    code_count_max (the largest moving average: keys per update)."""
    used, averages = codebook_counts(grads), codebook_counts(params)
    if used is None or averages is None:
        return {}
    dead = jnp.mean((averages < DEAD_COUNT).astype(jnp.float32), axis=(-2, -1))
    return code_metrics(used) | dict(dead_codes=dead, code_count_max=jnp.max(averages, axis=(-2, -1)))


def revival_report(grads: dict, params: dict, config: TransformerConfig) -> dict:
    """Returns revived_codes, float32 for every unit: the number of dead codes that this update moves; {} if codes are
    never revived. params: those before the update."""
    used, averages = codebook_counts(grads), codebook_counts(params)
    if not config.c_revive or used is None or averages is None:
        return {}
    n_moved = n_revived(ema_count(averages, used, config.c_gamma), config.c_revive)
    return dict(revived_codes=jnp.sum(n_moved, axis=-1).astype(jnp.float32))


def grad_norm(grads: dict) -> jax.Array:
    """Returns the global norm of the weights' gradients, before clipping; the codebooks' sums, which are not gradients,
    are left out."""
    leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if not is_codebook(path)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))


def abstract_batch(settings: Settings, mesh: jax.sharding.Mesh) -> dict:
    """Returns a batch of `Feed.batches` as ShapeDtypeStructs."""
    shape = (settings.train.batch_size, settings.train.update_len)
    dtypes = dict(inputs=np.int32, targets=np.int32, doc_ids=np.int32, loss_mask=np.float32)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for name, dtype in dtypes.items()}


def compiled_train_step(settings: Settings, mesh: jax.sharding.Mesh) -> TrainStep:
    """Returns `make_train_step` compiled for the settings' shapes. Prints the time and memory that it takes."""
    began = time.monotonic()
    abstract = abstract_train_state(settings, mesh), abstract_batch(settings, mesh)
    say(attention_line(settings.model, mesh))
    compiled = make_train_step(settings, mesh).lower(*abstract).compile()
    say(f"compiled in {time.monotonic() - began:.1f} s; {_memory(compiled)}")
    return TrainStep(compiled)


def _memory(compiled: jax.stages.Compiled) -> str:
    """Returns a description of a compiled step's memory on a device."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "memory unknown"
    gib = 2**30
    state, made = analysis.argument_size_in_bytes / gib, analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    more = (made + analysis.temp_size_in_bytes) / gib
    return f"a device holds {state:.2f} GiB of state and batch, and {more:.2f} GiB while it computes"
