"""The state that training begins or resumes with: from a checkpoint, from the seed, or from another run."""

import jax

from tvq_pod.config.settings import Settings
from tvq_pod.data import digest
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.parallel.mesh import sizes
from tvq_pod.parallel.processes import decided_by_process_zero
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.metrics import all_lines
from tvq_pod.training import ema
from tvq_pod.training.step import TrainState, abstract_train_state, create_recurrent, create_train_state
from tvq_pod.training.warm_start import WarmStart


def state_at(
    step: int | None,
    schedule: DataSchedule,
    checkpoints: Checkpoints,
    settings: Settings,
    mesh: jax.sharding.Mesh,
    warm: WarmStart | None = None,
) -> TrainState:
    """Returns the state of the checkpoint `step`, or for None the first state: that of the seed, or of a warm start.
    schedule: the data schedule from there on; if it begins with other streams, they have read nothing.

    Raises UserError if the run's log has another digest of the tokens up to `step` than the checkpoint.
    """
    if step is None:
        if warm is None:
            return create_train_state(settings, mesh)
        state = warm.state(mesh)
        checkpoints.descend_from(warm.ancestry)
        return state
    same_streams = schedule.now.first_step != step or len(schedule.phases) == 1
    abstract = abstract_train_state(settings, mesh)
    state = checkpoints.restore(step, abstract, with_recurrent=same_streams)
    state = _with_average(state, abstract, step, checkpoints, settings)
    if not same_streams:
        state = state.replace(recurrent=create_recurrent(settings, mesh))
        streams = f"{schedule.now.batch_size} of them, {schedule.now.update_len} tokens an update"
        say(f"streams start over at step {step}: {streams}")
        if data := schedule.now.data:
            say(f"other data is read from step {step} on: fingerprint {data[:16]}")
    workdir = checkpoints.path.parent
    # A run that went back and logged this step again may be set back to the earlier checkpoint, so any line counts.
    logged = [line.get("digest") for line in all_lines(workdir) if (line["split"], line["step"]) == ("train", step)]
    found = digest.as_text(jax.device_get(state.digest))
    if decided_by_process_zero(bool(logged) and not {None, found} & set(logged)):
        raise UserError(
            f"--workdir={workdir}: metrics.jsonl has digest {logged[-1]} of the tokens up to step {step}, but the "
            f"checkpoint has {found}; they are not from the same run, or that line is damaged and must be deleted"
        )
    say(f"resumes from step {step} in {checkpoints.path}")
    return state


def _with_average(
    state: TrainState, abstract: TrainState, step: int, checkpoints: Checkpoints, settings: Settings
) -> TrainState:
    """Returns the state with the moving average of its weights if the settings ask for one, otherwise without. Prints
    what differs from the checkpoint."""
    decay, has_one = settings.train.ema_decay, checkpoints.has_ema(step)
    if has_one and not decay:
        say(f"config.train.ema_decay=0.0: the moving average of the weights in checkpoint {step} is dropped")
    if has_one or not decay:
        return state
    say(f"config.train.ema_decay={decay}: checkpoint {step} has no moving average; it starts from the weights")
    shardings = jax.tree.map(lambda x: x.sharding, abstract.ema)
    return state.replace(ema=jax.jit(ema.start, out_shardings=shardings)(state.params))


def describe_state(state: TrainState, mesh: jax.sharding.Mesh) -> None:
    """Prints the size of the model, and the devices that it trains on."""
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    kind = mesh.devices.flat[0].device_kind
    say(f"{n_params:,} parameters on {mesh.size} {kind} device(s), mesh {sizes(mesh)}")
