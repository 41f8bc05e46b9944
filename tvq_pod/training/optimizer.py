"""The optimizer. For weights, it has clipping, a direction (of AdamW, Lion, Adafactor, Muon, ...), a schedule and
weight decay; for codebooks, their moving average.

The definitions follow Transformer-VQ's own code where it has them; docs/optimizer.md lists all of them, and the
differences.
"""

import math
from typing import NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from tvq_pod.config.settings import OptimizerSettings
from tvq_pod.nn.codebook import CODEBOOK, WEIGHTS, codebook_average, optimizer_labels
from tvq_pod.nn.model import is_stacked, is_vector

# Adafactor's constants, as in Shazeer & Stern, arXiv 1804.04235, and in optax.adafactor
MOMENT_DECAY = 0.8  # the moments of step t (1 at first) keep a share 1 - t ** -MOMENT_DECAY of the past
MOMENT_EPS = 1e-30  # added to squared gradients
CLIPPING_THRESHOLD = 1.0  # largest root mean square of one matrix's direction
LEAST_SCALE = 1e-3  # the least scale of a parameter, so that one that is 0 can move
LEAST_FACTORED = 128  # a matrix with fewer rows or columns keeps all of its moments
# Root mean square of Muon's direction of a matrix, once its singular values are 1. AdamW's is about the same, so one
# learning rate works for both (Liu et al., arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2
# Kernels here are [layers, heads, width, D]: one matrix [heads * width, D] per layer. Which of the two is called the
# input makes no difference to the direction.
MUON_AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
MATRIX, OTHER = "matrix", "other"


def schedule(settings: OptimizerSettings, num_steps: int) -> optax.Schedule:
    """Returns the function step -> share of the learning rate, 0 .. 1.

    The share is step / warmup_steps during warm-up, so the first step moves nothing. Then, by settings.schedule:

    - cosine, linear: it falls as a cosine or a line to `final_fraction` at the schedule's end, and stays there;
    - wsd: it is 1, and falls as a line in the `decay_steps` before the schedule's end, and stays there;
    - inverse_sqrt: it is sqrt(warmup_steps / step);
    - constant: it is 1.

    The schedule ends at schedule_steps, or at num_steps if that is 0.
    """
    warmup, end = settings.warmup_steps, settings.end_of_schedule(num_steps)
    peak = max(warmup, 1)
    after: optax.Schedule
    if settings.schedule == "inverse_sqrt":

        def inverse_sqrt(step):  # steps since the warm-up; join_schedules asks for negative ones too
            return jnp.sqrt(peak / (peak + jnp.maximum(step, 0)))

        after = inverse_sqrt
    elif settings.schedule == "constant":
        after = optax.constant_schedule(1.0)
    elif settings.schedule == "wsd":
        decay = optax.linear_schedule(1.0, settings.final_fraction, max(settings.decay_steps, 1))
        n_stable = settings.decay_begins(num_steps) - warmup
        after = optax.join_schedules([optax.constant_schedule(1.0), decay], [n_stable])
    elif settings.schedule == "linear":
        after = optax.linear_schedule(1.0, settings.final_fraction, max(end - warmup, 1))
    else:
        after = optax.cosine_decay_schedule(1.0, max(end - warmup, 1), alpha=settings.final_fraction)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])


def learning_rate(settings: OptimizerSettings, num_steps: int, step: int) -> float:
    """Returns the learning rate of the update after `step`."""
    return settings.learning_rate * float(jnp.asarray(schedule(settings, num_steps)(step)))


def make_optimizer(
    settings: OptimizerSettings, num_steps: int, c_gamma: float, c_revive: float = 0.0
) -> optax.GradientTransformation:
    """Returns the transformation of gradients into what `optax.apply_updates` adds to the parameters.

    With g the gradient, clipped by its global norm, a the learning rate and s the schedule's share, a weight w becomes

        w - s a direction(g) - weight_decay w

    Neither the direction, the learning rate nor the schedule scales the decay. Vectors (gains, biases, scales) are not
    decayed. Codebooks follow their moving average, with decay c_gamma, and are revived below a share c_revive of the
    mean count (see nn/codebook.py). Neither the clipping's norm nor anything else in the weights' chain sees them.

    Only the weights' chain has a state, so its state is the state here, with a `MaskedNode` at each codebook leaf.
    Checkpoints had this form before the codebooks' average became part of the transformation.
    """
    both = optax.multi_transform(
        {WEIGHTS: _weights_chain(settings, num_steps), CODEBOOK: codebook_average(c_gamma, c_revive)}, optimizer_labels
    )
    no_state = optax.MaskedState(inner_state=optax.EmptyState())  # for the codebooks

    def init(params):
        return cast(optax.PartitionState, both.init(params)).inner_states[WEIGHTS]

    def update(updates, state, params=None):
        states = optax.PartitionState({WEIGHTS: state, CODEBOOK: no_state})
        updates, states = both.update(updates, states, params)
        # rounded before they are added, as in all earlier runs with bfloat16 parameters
        updates = jax.tree.map(lambda update, param: update.astype(param.dtype), updates, params)
        return updates, cast(optax.PartitionState, states).inner_states[WEIGHTS]

    return optax.GradientTransformation(init, update)


def with_schedule_of(started: optax.OptState, state: optax.OptState) -> optax.OptState:
    """Returns `state`, a state of `make_optimizer`, with the learning-rate schedule where it is in `started`."""
    (*directions, _), (*_, scheduled) = (cast(optax.MaskedState, of).inner_state for of in (state, started))
    return optax.MaskedState(inner_state=(*directions, scheduled))


def steps_of_schedule(state: optax.OptState) -> jax.Array:
    """Returns the number of steps of the learning-rate schedule that were applied, int32, from a state of
    `make_optimizer`. Bad steps do not count."""
    *_, scheduled = cast(optax.MaskedState, state).inner_state
    return jnp.asarray(cast(optax.ScaleByScheduleState, scheduled).count)


def _weights_chain(settings: OptimizerSettings, num_steps: int) -> optax.GradientTransformation:
    directions = {
        "adamw": lambda: optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=jnp.float32),
        "lion": lambda: optax.scale_by_lion(settings.b1, settings.b2, mu_dtype=jnp.bfloat16),
        "adafactor": lambda: scale_by_adafactor(settings.multiply_by_parameter_scale),
        "muon": lambda: scale_by_muon(settings),
        "nadamw": lambda: optax.scale_by_adam(
            settings.b1, settings.b2, settings.eps, mu_dtype=jnp.float32, nesterov=True
        ),
        "sgd": lambda: optax.trace(settings.momentum, accumulator_dtype=jnp.float32),
    }
    scheduled = optax.scale_by_learning_rate(schedule(settings, num_steps))
    decayed = optax.add_decayed_weights(-settings.weight_decay, mask=_mask(lambda path: not is_vector(path)))
    # Checkpoints store this chain's states by index, so `nothing` is a placeholder that keeps the indices.
    nothing = optax.identity()
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else nothing,
        directions[settings.name](),
        optax.scale(settings.learning_rate),
        optax.masked(nothing, _mask(lambda path: not is_vector(path))),
        _followed(scheduled, decayed),
    )


def _followed(first: optax.GradientTransformation, then: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns both transformations, one after the other, with the state of the first; the second must have none."""

    def update(updates, state, params=None):
        assert params is not None
        updates, state = first.update(updates, state, params)
        return then.update(updates, then.init(params), params)[0], state

    return optax.GradientTransformation(first.init, update)


def _mask(keep):
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: keep(path), params)


# --- Muon ------------------------------------------------------------------------------------------------------------


def scale_by_muon(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Returns Muon's direction (Jordan et al., https://kellerjordan.github.io/posts/muon) for the kernels of the
    layers, and Adam's for everything else: the embedding, the output matrix, vectors.

    With m the momentum of the gradient, in Nesterov's form, U S V^T its singular value decomposition, and R, C the rows
    and columns of a kernel of one layer, taken as a matrix [heads * width, D], the direction is

        MUON_RMS sqrt(max(R, C)) U S' V^T

    S' is the result of five Newton-Schulz iterations on S: singular values between about 0.7 and 1.2. Momentum and
    moments have the shapes of their parameters, float32, so they are sharded like them.
    """
    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=settings.momentum,
            mu_dtype=jnp.float32,
            weight_dimension_numbers=lambda params: jax.tree.map(lambda _: MUON_AXES, params),
        ),
        optax.stateless(lambda updates, params: jax.tree.map(_of_adams_size, updates)),
    )
    others = optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=jnp.float32)

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: MATRIX if _is_kernel(path) else OTHER, params)

    return optax.partition({MATRIX: matrices, OTHER: others}, labels)


def _of_adams_size(orthogonal: jax.Array) -> jax.Array:
    *_, n_heads, width, n_columns = orthogonal.shape
    return MUON_RMS * max(n_heads * width, n_columns) ** 0.5 * orthogonal


def _is_kernel(path: tuple) -> bool:
    return getattr(path[-1], "key", None) == "kernel"


# --- Adafactor -------------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """Moving averages of a matrix's squared gradients, float32. rows: means over its last axis. columns: means over its
    other axes. For stacked layers, both have a leading axis of n_layer."""

    rows: jax.Array
    columns: jax.Array


class AdafactorState(flax.struct.PyTreeNode):
    """Adafactor's state. count: int32 scalar, the number of updates. moments: a tree like the parameters, with
    `Factors` for large matrices and a float32 array of the parameter's shape for other leaves."""

    count: jax.Array
    moments: optax.Updates


def scale_by_adafactor(multiply_by_parameter_scale: bool) -> optax.GradientTransformation:
    """Returns Adafactor's direction (Shazeer & Stern, arXiv 1804.04235), without momentum.

    It does what optax.adafactor does, but for the layout of parameters here. Layers are stacked along a leading axis;
    each layer has its own moments, clipping and scale, as if it were a separate array. A kernel [H, width, D] counts as
    one matrix [H * width, D] for any number of heads; nothing is reshaped, so every array keeps its sharding.

    multiply_by_parameter_scale: whether a step is relative to the root mean square of the parameter (of one layer), as
    in the paper. Otherwise it is absolute.
    """

    def init(params):
        def zeros(path, param):
            if not _is_factored(path, param):
                return jnp.zeros_like(param, jnp.float32)
            layers = param.shape[: _own_axes(path, param)[0]]
            return Factors(
                rows=jnp.zeros(param.shape[:-1], jnp.float32),
                columns=jnp.zeros((*layers, param.shape[-1]), jnp.float32),
            )

        return AdafactorState(jnp.zeros([], jnp.int32), jax.tree_util.tree_map_with_path(zeros, params))

    def update(updates, state, params=None):
        assert params is not None
        count = state.count + 1
        kept = 1.0 - count.astype(jnp.float32) ** -MOMENT_DECAY

        def next_moments(path, grad, moments):
            own, squares = _own_axes(path, grad), jnp.square(grad.astype(jnp.float32)) + MOMENT_EPS
            if not isinstance(moments, Factors):
                return kept * moments + (1.0 - kept) * squares
            rows, columns = jnp.mean(squares, own[-1:]), jnp.mean(squares, own[:-1])
            return Factors(kept * moments.rows + (1.0 - kept) * rows, kept * moments.columns + (1.0 - kept) * columns)

        def direction(path, grad, moments, param):
            own = _own_axes(path, grad)
            if isinstance(moments, Factors):
                rows = moments.rows / jnp.mean(moments.rows, own[:-1], keepdims=True)
                step = grad * jax.lax.rsqrt(jnp.expand_dims(rows, own[-1]))
                step *= jax.lax.rsqrt(jnp.expand_dims(moments.columns, own[:-1]))
            else:
                step = grad * jax.lax.rsqrt(moments)
            step /= jnp.maximum(_rms(step, own) / CLIPPING_THRESHOLD, 1.0)
            return step * jnp.maximum(_rms(param, own), LEAST_SCALE) if multiply_by_parameter_scale else step

        moments = jax.tree_util.tree_map_with_path(next_moments, updates, state.moments)
        updates = jax.tree_util.tree_map_with_path(direction, updates, moments, params)
        return updates, AdafactorState(count, moments)

    # optax's types only allow states that are tuples or arrays, but any pytree works.
    return optax.GradientTransformation(cast(optax.TransformInitFn, init), cast(optax.TransformUpdateFn, update))


def _own_axes(path: tuple, x) -> tuple[int, ...]:
    """Returns the axes of one layer's parameter: all but the axis of layers."""
    return tuple(range(1 if is_stacked(path) else 0, x.ndim))


def _is_factored(path: tuple, param) -> bool:
    own = _own_axes(path, param)
    if is_vector(path) or len(own) < 2:
        return False
    n_rows, n_columns = math.prod(param.shape[axis] for axis in own[:-1]), param.shape[-1]
    return min(n_rows, n_columns) >= LEAST_FACTORED


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axes, keepdims=True))
