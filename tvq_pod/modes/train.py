"""--mode=train: from a config to a trained model. Reads from top to bottom: check, prepare, restore, loop, finish.

What happens to one process and must be known to all is agreed on: where to save or stop after a signal
(parallel/stopping.py); that a save failed, by a vote before every step. What follows from numbers (a bad step) every
process computes alike. So all save, stop and go back at the same step.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from tvq_pod.config.identity import run_record
from tvq_pod.config.settings import Settings
from tvq_pod.data.loader import global_batches
from tvq_pod.data.open import check_source, describe, open_store, run_vocab
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.store import TokenStore, store_path
from tvq_pod.data.streams import TrainStreams, streams_of
from tvq_pod.data.vocab import keep_vocab
from tvq_pod.errors import Preempted, UserError
from tvq_pod.host.terminal import OutputError, say
from tvq_pod.inference import images
from tvq_pod.inference.evaluation_lines import own_losses, report, subject
from tvq_pod.inference.evaluator import Evaluator
from tvq_pod.inference.text import continuations
from tvq_pod.parallel.mesh import check_rows, make_mesh, sizes
from tvq_pod.parallel.processes import Votes, decided_by_process_zero, is_process_zero, on_process_zero
from tvq_pod.parallel.sharding import on_one_device
from tvq_pod.run import config_history, packages
from tvq_pod.run.checkpoint import RETRY_SECONDS, Checkpoints
from tvq_pod.run.continued import check_continues
from tvq_pod.run.lock import locked
from tvq_pod.run.metrics import MetricsWriter, bits_per_byte, check_packages, lines_of
from tvq_pod.run.preemption import SAVE, STOP, Preemption
from tvq_pod.run.progress import Speed, hours
from tvq_pod.run.skipped import Skip, Skipped
from tvq_pod.run.status import Status
from tvq_pod.run.stopping import StopTogether
from tvq_pod.training import digest
from tvq_pod.training.optimizer import learning_rate
from tvq_pod.training.step import (
    TrainState,
    abstract_train_state,
    create_recurrent,
    create_train_state,
    make_train_step,
)

RETRIES = 30  # to write the last checkpoint
STATUS_VALUES = ("loss", "bits_per_byte", "tokens_per_second", "eta_seconds")


@dataclasses.dataclass
class BadStretch(Exception):
    """So many steps in a row were bad that the run must go back."""

    last_step: int
    n_bad: int


def train(settings: Settings, workdir: epath.Path, preemption: Preemption) -> None:
    """Trains to config.train.num_steps, from the newest good checkpoint in `workdir` if there is one.

    Raises Preempted after SIGTERM, SIGINT or SIGHUP to any process, once all is saved.
    """
    # ------------------------------------------------- what can be refused before anything is written
    mesh = make_mesh(settings.mesh)
    check_rows(settings, mesh)
    check_packages(settings.metrics)
    images.check_packages(settings)
    if settings.eval.cache == "off":
        raise UserError("config.eval.cache=off: is for --mode=eval; training evaluates the model as it is")
    if settings.data.mixture:
        open_store(settings, workdir)
    elif not TokenStore.exists(store_path(settings, workdir)):
        check_continues(settings, workdir)
        check_source(settings, workdir)
    with contextlib.ExitStack() as opened:
        on_process_zero(lambda: opened.enter_context(locked(workdir)))
        status = opened.enter_context(Status(workdir, settings.train.num_steps, enabled=is_process_zero()))
        on_process_zero(lambda: open_store(settings, workdir))
        _Session(settings, workdir, mesh, preemption, opened, status).run()


class _Session:
    """One run of the command: from what is in the folder to the last step, or to a signal."""

    def __init__(
        self,
        settings: Settings,
        workdir: epath.Path,
        mesh: jax.sharding.Mesh,
        preemption: Preemption,
        opened: contextlib.ExitStack,
        status: Status,
    ):
        """opened: closes what has threads or files of its own, however the session ends."""
        self.settings, self.workdir, self.mesh = settings, workdir, mesh
        self.preemption, self.opened, self.status = preemption, opened, status
        self.store = open_store(settings, workdir, may_make=False)
        self.split = self.store.split("train")
        self.evaluator = _make_evaluator(settings, mesh, self.store)
        self.record = run_record(settings, self.store.vocab_name, self.store.fingerprint)
        self.checkpoints = opened.enter_context(
            contextlib.closing(
                Checkpoints(workdir, settings.checkpoint, status.saved, before_named=lambda: self.writer.flush())
            )
        )
        self.evaluated: dict[int, float | None] = {}  # losses on the way to the state, by step
        self.skipped = Skipped(workdir)
        self.votes = Votes(mesh, ("save_failed", "save_busy"))
        self.stop = StopTogether(preemption, settings.checkpoint.grace_seconds)
        self.step_fn = None
        self.schedule: DataSchedule | None = None

    def run(self) -> None:
        """From the newest good checkpoint to the end."""
        config = self.settings.train
        # ------------------------------------------------- checkpoint
        first_step = self.checkpoints.newest_good()
        self.status.saved(first_step)
        if first_step is not None:
            self._check_belongs(first_step)
        elif logged := lines_of(self.workdir, "train"):
            say(f"WARNING: metrics.jsonl has step {max(logged)}, and there is no checkpoint: starts over from the seed")
        describe(self.store)
        self._streams(self._schedule_at(first_step))  # enough tokens for all rows?
        state, first_step = self._state_at(first_step)
        # ------------------------------------------------- nothing can be refused any more
        if is_process_zero():
            config_history.tell(self.workdir, self.settings, first_step, learning_rate)
        if is_process_zero() and (first_step < config.num_steps or not (self.workdir / "config.json").exists()):
            keep_vocab(self.store.vocab(), self.workdir)
            config_history.keep(self.workdir, self.settings, first_step)
            packages.record(self.workdir, first_step)
        self.writer = MetricsWriter(
            self.workdir, self.settings.metrics, dataclasses.asdict(self.settings), enabled=is_process_zero()
        )
        self.opened.enter_context(contextlib.closing(self.writer))
        self.evaluated = own_losses(self.workdir, self.settings, self.store, self.checkpoints.identity)
        self.checkpoints.know_losses(self.evaluated)
        n_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        kind = jax.devices()[0].device_kind
        say(f"{n_params:,} parameters on {self.mesh.size} {kind} device(s), mesh {sizes(self.mesh)}")
        # ------------------------------------------------- steps, and back where they went wrong
        if first_step >= config.num_steps:
            say(f"nothing to train: step {first_step} of config.train.num_steps={config.num_steps} is there")
        elif self._evaluates_at(first_step) and not decided_by_process_zero(first_step in self.evaluated):
            self._evaluate(state, first_step)  # what was broken off when the session before was asked to end
        if first_step < config.num_steps:
            self.status.begin()
        while first_step < config.num_steps:
            try:
                state = self._steps(state, first_step)
                break
            except BadStretch as raised:
                bad = raised.with_traceback(None)  # whose frames hold the state
            del state
            state, first_step = self._go_back(bad)
        # ------------------------------------------------- the end
        last_step = max(first_step, config.num_steps)
        evaluate = self.settings.eval.at_end or _due(last_step, self.settings.eval.every_steps)
        if self.evaluator and evaluate and not decided_by_process_zero(last_step in self.evaluated):
            self._evaluate(state, last_step)
        self.preemption.can_save = False  # all is saved
        self.stop.close()
        if self.settings.sample.length:
            params = on_one_device(state.params, self.mesh)
            on_process_zero(lambda: _sample(self.settings, self.workdir, params, last_step))
        say(f"done: {self.workdir}")

    # ------------------------------------------------------------------ where to go on

    def _check_belongs(self, step: int) -> None:
        """Raises UserError if a checkpoint is of another run, or of other streams and they may not start anew."""
        self.checkpoints.check(step, self.record)
        if self.settings.train.on_batch_change == "refuse":
            self.checkpoints.check_streams(step, self.settings.train)

    def _schedule_at(self, step: int | None) -> DataSchedule:
        """The schedule that leads on from a checkpoint, or from the beginning: stretches that have been skipped since,
        and a change of the batch, are in it."""
        config = self.settings.train
        if step is None:
            schedule = DataSchedule.begin(config.batch_size, config.update_len)
        else:
            schedule = self.checkpoints.schedule(step)
            if (schedule.now.batch_size, schedule.now.update_len) != (config.batch_size, config.update_len):
                schedule = schedule.changed(step, config.batch_size, config.update_len)
        return self.skipped.put_into(schedule)

    def _state_at(self, step: int | None) -> tuple[TrainState, int]:
        """The state of a checkpoint, or for None that of the seed, and its step. Sets the schedule."""
        self.schedule = self._schedule_at(step)
        self.checkpoints.begin(step)
        self.evaluated = {at: loss for at, loss in self.evaluated.items() if at <= (step or 0)}
        if step is None:
            return create_train_state(self.settings, self.mesh), 0
        abstract = abstract_train_state(self.settings, self.mesh)
        same_streams = self.schedule.now.first_step != step or len(self.schedule.phases) == 1
        state = self.checkpoints.restore(step, abstract, with_recurrent=same_streams)
        if not same_streams:
            state = state.replace(recurrent=create_recurrent(self.settings, self.mesh))
            say(f"streams start anew at step {step}: {self.schedule.now.batch_size} of them, "
                f"{self.schedule.now.update_len} tokens an update")  # fmt: skip
        seen = lines_of(self.workdir, "train").get(step, {}).get("digest")
        found = digest.as_text(jax.device_get(state.digest))
        if decided_by_process_zero(seen not in (None, found)):
            raise UserError(
                f"--workdir={self.workdir}: metrics.jsonl has digest {seen} of the tokens up to step {step}, "
                f"its checkpoint {found}; they are not of one run, or that line is damaged: then delete it"
            )
        say(f"goes on from step {step} in {self.checkpoints.path}")
        return state, step

    def _go_back(self, bad: BadStretch) -> tuple[TrainState, int]:
        """The state of the newest good step before a stretch of bad ones; from now on, their data is skipped."""
        limit = self.settings.bad_steps.max_rollbacks
        before = bad.last_step - bad.n_bad
        if self.skipped.count() >= limit:
            raise UserError(
                f"config.bad_steps.max_rollbacks={limit}: steps {before + 1} to {bad.last_step} were bad, and the run "
                f"has gone back so often ({self.skipped.path} says where); mend the data or the settings, or allow more"
            )
        self.checkpoints.wait()
        self.checkpoints.undo(after=before)
        step = self.checkpoints.newest_good()
        self.status.saved(step)
        phase = self.schedule.now
        first, last = phase.update(before), phase.update(bad.last_step - 1)
        skip = Skip(phase.first_step, phase.batch_size, phase.update_len, first, last - first + 1)
        self.skipped.add(skip, steps=(before + 1, bad.last_step), back_to=step or 0)
        say(
            f"BAD: steps {before + 1} to {bad.last_step} could not be applied; goes back to step {step or 0} and skips "
            f"updates {first} to {last} of every stream"
        )
        self.speed.restart(step or 0)
        return self._state_at(step)

    # ------------------------------------------------------------------ the loop

    def _streams(self, schedule: DataSchedule) -> TrainStreams:
        return streams_of(schedule, self.split.starts, self.settings.seed, self.split.parts)

    def _batches(self, first_step: int) -> Iterator[dict]:
        config, data = self.settings.train, self.settings.data
        return global_batches(
            self.split,
            self._streams(self.schedule),
            self.mesh,
            batch_size=config.batch_size,
            update_len=config.update_len,
            first_step=first_step,
            last_step=config.num_steps,
            threads=data.num_threads,
            ahead=data.prefetch_batches,
            update_of=self.schedule.now.update,
        )

    def _steps(self, state: TrainState, first_step: int) -> TrainState:
        """From first_step to the last. Raises BadStretch, or Preempted."""
        config = self.settings.train
        every = self.settings.checkpoint.every_steps
        behind = None
        interval, waiting = [], None  # metrics since the last log, and those to be logged once the device moved on
        owed, failing = False, False  # a checkpoint is due; it could not be written, and it is too early to try again

        def log() -> None:
            nonlocal waiting
            if waiting:
                self._log(*waiting)
            waiting = None

        with contextlib.closing(self._batches(first_step)) as batches:
            for step in range(first_step + 1, config.num_steps + 1):  # what the state's will be when the update is done
                batch = next(batches)
                self._compile_once(state, batch, first_step)
                self._vote()
                state, metrics = self.step_fn(state, batch)
                interval.append(metrics)
                # The host runs ahead of the device by one step, no more: batches take memory.
                if behind is not None:
                    self._check_bad(behind, step - 1)
                behind = metrics
                told, asked = self.votes.result(), self.stop.now()
                stop = asked == STOP
                log()  # fetched only now that the device has its next step to do
                if told["save_failed"] and not failing:
                    say(
                        f"WARNING: a checkpoint could not be written ({self.checkpoints.error}): training goes on, and "
                        "tries again; those before it are whole"
                    )
                failing = told["save_failed"] or (failing and told["save_busy"])
                owed |= failing or _due(step, every) or asked == SAVE
                last = step == config.num_steps
                # Between bad steps nothing is saved: what a run can go back to must be from before them.
                save = last or (owed and not failing and not int(metrics["n_bad"]))
                evaluate = not last and self._evaluates_at(step)
                if step % config.log_every_steps == 0 or save or stop:
                    waiting, interval = (step, interval), []
                if save or evaluate or stop:
                    log()
                if stop:
                    self._leave(state, step)
                # What belongs to a step is written before its checkpoint: a run that goes on from there does not come
                # back for it.
                if evaluate:
                    self._evaluate(state, step)
                if last:
                    self._check_bad(metrics, step)
                    self._save_surely(state, step, retain_all=bool(int(metrics["n_bad"])))
                elif save:
                    self.checkpoints.wait()  # whether the one before could be written makes no difference to this one
                    self.checkpoints.save(state, step, self.record, self.schedule)
                    owed = False
        return state

    def _compile_once(self, state: TrainState, batch: dict, first_step: int) -> None:
        if self.step_fn is None:
            began = time.monotonic()
            self.step_fn = make_train_step(self.settings, self.mesh).lower(state, batch).compile()
            say(f"compiled in {time.monotonic() - began:.1f} s; {_memory(self.step_fn)}")
            config = self.settings.train
            self.speed = Speed(first_step, config.num_steps, config.batch_size * config.update_len)
            self.preemption.can_save = True

    def _vote(self) -> None:
        self.votes.cast(
            save_failed=self.checkpoints.failing,
            save_busy=self.checkpoints.busy,
        )

    def _check_bad(self, metrics: dict, step: int) -> None:
        """Waits for the step. Raises BadStretch if it is one too many."""
        n_bad = int(metrics["n_bad"])
        if n_bad >= self.settings.bad_steps.rollback_after:
            raise BadStretch(step, n_bad)

    def _log(self, step: int, metrics: list[dict]) -> None:
        """Waits for the step, and logs means over some steps."""
        values = _means(jax.device_get(metrics)) | self.speed.seen(step)
        values["bits_per_byte"] = bits_per_byte(values["loss"], self.store.tokens_per_byte("train"))
        self.writer.write(step, "train", values)
        self.status.update(step=step, **{name: values[name] for name in STATUS_VALUES})
        n_steps = self.settings.train.num_steps
        bad = f"  {values['bad_steps']} bad" if values["bad_steps"] else ""
        say(
            f"step {step:>{len(str(n_steps))}}/{n_steps}  loss {values['loss']:.4f}  "
            f"bits/byte {values['bits_per_byte']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"ETA {hours(values['eta_seconds'])}{bad}"
        )

    def _evaluates_at(self, step: int) -> bool:
        return bool(self.evaluator) and step > 0 and _due(step, self.settings.eval.every_steps)

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Raises Preempted if the run is asked to end meanwhile."""
        result = self.evaluator.evaluate(state.params, lambda: self._told_to_stop(state, step))
        if result is None:
            self._leave(state, step)
        report(result, step, "validation")
        about = subject(self.settings, self.store, self.checkpoints.identity(step))
        self.writer.write(step, "validation", result.numbers() | about)
        self.evaluated[step] = result.loss
        self.checkpoints.know_losses({step: result.loss})
        if self.step_fn:
            self.speed.skip()

    def _told_to_stop(self, state: TrainState, step: int) -> bool:
        """In an evaluation: saves if the run is asked to; returns whether it is asked to end."""
        asked = self.stop.now()
        if asked == SAVE:
            self.checkpoints.wait()
            self.checkpoints.save(state, step, self.record, self.schedule, retain_all=True)  # as in _leave
        return asked == STOP

    # ------------------------------------------------------------------ how it ends

    def _leave(self, state: TrainState, step: int) -> None:
        """Saves, and raises Preempted."""
        self.checkpoints.wait()
        # It may be between bad steps: those of before, which the run may have to go back to, stay.
        self.checkpoints.save(state, step, self.record, self.schedule, retain_all=True)
        if not self.checkpoints.wait_for_all():
            raise UserError(
                f"--workdir={self.workdir}: asked to end, and step {step} could not be saved "
                f"({self.checkpoints.error}); the checkpoints before it are whole"
            )
        raise Preempted(f"saved step {step} and ends, as a signal asked; start again to go on")

    def _save_surely(self, state: TrainState, step: int, retain_all: bool) -> None:
        """Until the checkpoint is on disk. Raises UserError if it can't be written for minutes.

        retain_all: see Checkpoints.save.
        """
        for attempt in itertools.count(1):
            self.checkpoints.wait()
            self.checkpoints.save(state, step, self.record, self.schedule, retain_all)
            if self.checkpoints.wait_for_all():
                return
            why = self.checkpoints.error or "another process says why"
            if attempt == RETRIES:
                raise UserError(
                    f"--workdir={self.workdir}: the last checkpoint can't be written ({why}); those before it are "
                    "whole; make room and start again"
                )
            say(f"WARNING: the last checkpoint could not be written ({why}): tries again in {RETRY_SECONDS:g} s")
            time.sleep(RETRY_SECONDS)


def _make_evaluator(settings: Settings, mesh: jax.sharding.Mesh, store: TokenStore) -> Evaluator | None:
    if not (settings.eval.every_steps or settings.eval.at_end):
        return None
    if not store.meta["splits"]["validation"]["n_documents"]:
        say("no document fell into the validation split: nothing will be evaluated; see config.data.validation_share")
        return None
    return Evaluator(settings, mesh, store, "validation")


def _sample(settings: Settings, workdir: epath.Path, params: dict, step: int) -> None:
    """Prints a sample, and keeps it in WORKDIR/samples; images are only kept."""
    if images.are_images(settings):
        drawn = images.draw_images(params, settings.model, settings.sample, jax.local_devices())
        images.write_samples(drawn, workdir, step)
        return
    vocab = run_vocab(settings, workdir)
    prompt = settings.sample.prompt.encode()
    devices = jax.local_devices()[:1]
    text = "".join(next(continuations(params, settings.model, vocab, settings.sample, [prompt], devices)))
    path = workdir / "samples" / f"step_{step}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        say(f"a sample, kept in {path}:")
    except OSError as error:
        say(f"WARNING: {path} can't be written ({error.strerror}); the sample:")
    with contextlib.suppress(OutputError):  # nobody reads it: all is saved
        print(text, flush=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _means(metrics: list[dict]) -> dict:
    """Of the steps that were applied; the newest digest, and how many steps were not."""
    good = [m for m in metrics if not m["n_bad"]]
    means = {
        name: np.mean([m[name] for m in good or metrics], axis=0, dtype=np.float64).tolist()
        for name in metrics[0]
        if name not in ("n_bad", "digest")
    }
    by_unit = {f"{name}_by_unit": value for name, value in means.items() if isinstance(value, list)}
    means |= {name.removesuffix("_by_unit"): float(np.mean(value)) for name, value in by_unit.items()}
    return means | by_unit | dict(bad_steps=len(metrics) - len(good), digest=digest.as_text(metrics[-1]["digest"]))


def _memory(compiled) -> str:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "memory unknown"
    gib = 2**30
    state, temp = analysis.argument_size_in_bytes / gib, analysis.temp_size_in_bytes / gib
    return f"a device holds {state:.2f} GiB of state and batch, and {temp:.2f} GiB while it computes"
