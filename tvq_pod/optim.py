"""The optimizer of all weights but the codebook: clipping, AdamW, Lion or Adafactor, schedule, weight decay."""

import jax
import jax.numpy as jnp
import optax

from tvq_pod.config import OptimizerSettings
from tvq_pod.nn.model import is_codebook, is_vector


def schedule(settings: OptimizerSettings, num_steps: int) -> optax.Schedule:
    """step -> share of the learning rate, 0 .. 1: linear warm-up to 1, then cosine or linear to `final_fraction` at
    num_steps, or inverse_sqrt: sqrt(warmup_steps / step)."""
    warmup = settings.warmup_steps
    if settings.schedule == "inverse_sqrt":
        peak = max(warmup, 1)

        def after(step):  # steps since the warm-up; join_schedules asks for negative ones too
            return jnp.sqrt(peak / (peak + jnp.maximum(step, 0)))

    elif settings.schedule == "linear":
        after = optax.linear_schedule(1.0, settings.final_fraction, max(num_steps - warmup, 1))
    else:
        after = optax.cosine_decay_schedule(1.0, max(num_steps - warmup, 1), alpha=settings.final_fraction)
    if not warmup:
        return after
    # step 0 already moves: (step + 1) / warmup
    return optax.join_schedules([optax.linear_schedule(1 / warmup, 1.0, max(warmup - 1, 1)), after], [warmup])


def make_optimizer(settings: OptimizerSettings, num_steps: int) -> optax.GradientTransformation:
    """The chain of updates. Codebook leaves are masked out: they have no optimizer state and pass through untouched.

    With g the clipped gradient, a the learning rate and s the schedule's share, a weight w becomes

        w - s (a * direction(g) + weight_decay * w)

    (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2): neither the optimizer's preconditioner nor its learning rate
    scales the decay. Vectors (gains, biases) are not decayed.
    """
    directions = {
        "adamw": lambda: optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
        "lion": lambda: optax.scale_by_lion(b1=settings.b1, b2=settings.b2),
        # Shazeer & Stern, arXiv 1804.04235, with absolute step sizes and without momentum
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    }
    steps = [
        # identity, not nothing: the optimizer's state in a checkpoint keeps its form
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        directions[settings.name](),
        optax.scale(settings.learning_rate),
        optax.add_decayed_weights(settings.weight_decay, mask=_mask(lambda path: not is_vector(path))),
        optax.scale_by_learning_rate(schedule(settings, num_steps)),
    ]
    return optax.masked(optax.chain(*steps), _mask(lambda path: not is_codebook(path)))


def _mask(keep):
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: keep(path), params)
