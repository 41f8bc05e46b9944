"""--mode=train: from a config to a trained model. Read it from top to bottom: check, prepare, restore, loop, finish.

All processes save, stop and go back at the same step: they agree on what happens to one of them (run/saver.py,
run/stopping.py), and each computes the same decisions from the same numbers, for example that a step is bad."""

import contextlib
import dataclasses

import jax
from etils import epath

from tvq_pod.config.context_schedule import check_context_schedule
from tvq_pod.config.identity import run_record
from tvq_pod.config.mixture_schedule import check_mixture_schedule
from tvq_pod.config.relations import unfinished_warmup
from tvq_pod.config.settings import Settings
from tvq_pod.data.loader import Feed
from tvq_pod.data.open import check_source, describe, open_on_all, open_store
from tvq_pod.data.run_streams import StagedStreams, streams_of
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.store import TokenStore, store_path
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.inference import images
from tvq_pod.inference.evaluation_lines import own_losses, report, subject
from tvq_pod.inference.evaluators import validation_evaluator
from tvq_pod.inference.text import keep_sample
from tvq_pod.parallel.attention import check_attention, with_tried_attention
from tvq_pod.parallel.mesh import check_rows, make_mesh
from tvq_pod.parallel.processes import Votes, decided_by_process_zero, is_process_zero, on_process_zero
from tvq_pod.parallel.sharding import on_one_device
from tvq_pod.planning.source_lines import operations
from tvq_pod.planning.utilization import yardstick
from tvq_pod.run import step_back
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.continued import check_continues
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.goodput_table import COMPILE, END, EVALUATION, RESTORE
from tvq_pod.run.lock import locked
from tvq_pod.run.metrics import MetricsWriter, check_packages, lines_of
from tvq_pod.run.own_data import as_the_run_knows_it
from tvq_pod.run.preemption import SAVE, STOP, Preemption
from tvq_pod.run.progress import Speed
from tvq_pod.run.result import RunResult
from tvq_pod.run.rollback import BadStretch, Rollback, check_good
from tvq_pod.run.saver import VOTES, Saver, is_every
from tvq_pod.run.skipped import Skipped
from tvq_pod.run.start import record_start
from tvq_pod.run.status import Status
from tvq_pod.run.stopping import StopTogether
from tvq_pod.run.traces import Profiler, check_hosts
from tvq_pod.run.training_log import TrainingLog
from tvq_pod.training.optimizer import learning_rate
from tvq_pod.training.restore import describe_state, state_at
from tvq_pod.training.step import TrainState, TrainStep, compiled_train_step, weights_in_use
from tvq_pod.training.warm_start import WarmStart, ignored


def train(
    settings: Settings,
    workdir: epath.Path,
    preemption: Preemption,
    step: int | None = None,
    started_at: float | None = None,
) -> None:
    """Trains to config.train.num_steps, from the newest good checkpoint in `workdir` if there is one; or from `step`,
    in which case newer checkpoints are set aside.

    started_at: the time of the command, in seconds since 1970; None: now.

    Raises Preempted after SIGTERM, SIGINT or SIGHUP to any process, once everything is saved.
    """
    goodput = Goodput(started_at)
    mesh = make_mesh(settings.mesh)
    warm = _check(settings, workdir, mesh)
    step = step_back.asked_step(workdir, step)
    num_steps, enabled = settings.train.num_steps, is_process_zero()
    status = Status(workdir, num_steps, enabled, goodput)
    result = RunResult(workdir, num_steps, status, preemption, enabled)
    with result, contextlib.ExitStack() as opened:
        on_process_zero(lambda: opened.enter_context(locked(workdir)))
        opened.enter_context(status)
        if warm:
            opened.enter_context(contextlib.closing(warm))
        _Session(settings, workdir, mesh, preemption, opened, status, result, warm, step).run()


def _check(settings: Settings, workdir: epath.Path, mesh: jax.sharding.Mesh) -> WarmStart | None:
    """Raises UserError for anything that can be refused before the first write. Returns the warm start, if the run
    starts from another run."""
    check_context_schedule(settings.train)
    check_mixture_schedule(settings.data, settings.train)
    check_rows(settings, mesh)
    check_attention(settings.model, mesh)
    check_packages(settings.metrics)
    check_hosts(settings.profile)
    images.check_packages(settings)
    if settings.eval.cache == "off":
        raise UserError("config.eval.cache=off: is for --mode=eval; training evaluates the model as it is")
    if settings.train.ema_decay and settings.eval.weights == "raw":
        raise UserError(
            "config.eval.weights=raw: is for --mode=eval and --mode=sample; training evaluates the average that "
            f"config.train.ema_decay={settings.train.ema_decay} keeps; give ema"
        )
    if warning := unfinished_warmup(settings):
        say(f"WARNING: {warning}")
    if settings.data.mixture:
        open_store(settings, workdir)
    elif not TokenStore.exists(store_path(settings, workdir)):
        check_continues(settings, workdir)
        check_source(settings, workdir)
    return WarmStart.of(settings, workdir)


class _Session:
    """One run of the command: from the state in the folder to the last step, or to a signal."""

    def __init__(
        self,
        settings: Settings,
        workdir: epath.Path,
        mesh: jax.sharding.Mesh,
        preemption: Preemption,
        opened: contextlib.ExitStack,
        status: Status,
        result: RunResult,
        warm: WarmStart | None,
        step: int | None,
    ):
        """opened: closes everything with threads or files of its own, however the session ends. warm: the run that this
        one starts from, if there is one. step: the step to go back to; None: the newest."""
        self.settings, self.workdir, self.mesh = settings, workdir, mesh
        self.preemption, self.opened, self.status, self.result = preemption, opened, status, result
        self.goodput = status.goodput
        self.warm, self.step = warm, step
        self.store = as_the_run_knows_it(open_on_all(settings, workdir), settings, workdir, step)
        self.tried = with_tried_attention(settings, mesh)
        self.split = self.store.split("train")
        self.evaluator = validation_evaluator(self.tried, mesh, self.store)
        if warm:
            warm.check_vocab(self.store.vocab_name)
        self.record = run_record(settings, self.store.vocab_name, self.store.fingerprint)
        checkpoints = Checkpoints(workdir, settings.checkpoint, status.saved, before_named=lambda: self.writer.flush())
        self.checkpoints = opened.enter_context(contextlib.closing(checkpoints))
        self.saver = Saver(checkpoints, Votes(mesh, VOTES), settings.checkpoint, self.record, self.goodput)
        judged = settings.train, settings.bad_steps
        self.rollback = Rollback(checkpoints, Skipped(workdir), *judged, self.store.fingerprint)
        self.stop = StopTogether(preemption, settings.checkpoint.grace_seconds)
        self.evaluated: dict[int, float | None] = {}  # by step, the losses of checkpoints that led to the state
        self.step_fn: TrainStep | None = None

    def run(self) -> None:
        """Trains from the newest good checkpoint to the end."""
        num_steps = self.settings.train.num_steps
        with self.goodput.on(RESTORE):
            newest = self._check_newest()
            state, first_step = self._state_at(newest), newest or 0
        self._open_logs(state, first_step)  # nothing is refused from here on
        if first_step < num_steps:
            self.status.begin()
        if newest is None and self.warm:
            self.saver.save(state, 0)  # the run does not need the other one from here on
        if first_step >= num_steps:
            say(f"nothing to train: step {first_step} of config.train.num_steps={num_steps} has been reached")
        elif self._evaluates_at(first_step) and not decided_by_process_zero(first_step in self.evaluated):
            self._evaluate(state, first_step)  # it was interrupted when the previous session was asked to end
        while first_step < num_steps:
            try:
                state = self._steps(state, first_step)
                break
            except BadStretch as raised:
                bad = raised.with_traceback(None)  # the frames hold the state
            del state
            self.profiler.end()
            self.goodput.end_steps(bad.last_step, RESTORE)
            before = self.rollback.go_back(bad, self.saver.schedule)
            self.status.saved(before)
            state, first_step = self._state_at(before), before or 0
            self.log.restart(first_step)
        self._finish(state, max(first_step, num_steps))

    def _steps(self, state: TrainState, first_step: int) -> TrainState:
        """The training loop, from first_step to the last. Raises BadStretch or Preempted."""
        num_steps, bad_steps = self.settings.train.num_steps, self.settings.bad_steps
        behind = None
        with contextlib.closing(self._feed().batches(first_step, num_steps)) as batches:
            # step: the state's step after the update
            steps, goodput = range(first_step + 1, num_steps + 1), self.goodput
            for step, batch in zip(steps, goodput.fetched(batches), strict=True):
                step_fn = self._compiled(first_step)  # after the first batch, so that a damaged store is reported first
                goodput.begin_step(step)
                with self.profiler.step(step, behind):
                    self.saver.vote()
                    state, metrics = step_fn(state, batch)
                    goodput.given(metrics["n_bad"])
                    # The host is only one step ahead of the device, since batches take memory.
                    if behind is not None:
                        check_good(behind, step - 1, bad_steps)
                self.profiler.end_step(step, metrics)
                behind = metrics
                self.saver.hear()
                asked = self.stop.now()
                self.log.add(step, metrics)
                is_last = step == num_steps
                save = is_last or self.saver.is_due(step, metrics, is_asked=asked == SAVE)
                evaluate = not is_last and self._evaluates_at(step)
                # A step's lines are written before its checkpoint: a resumed run does not write them again.
                if save or asked == STOP:
                    self.log.end_line(step)
                if save or asked == STOP or evaluate:
                    self.log.write_due()
                    jax.block_until_ready(metrics)  # what follows would wait for the step, too, and be charged its time
                if asked == STOP:
                    self.saver.save_and_leave(state, step)
                if evaluate:
                    self._evaluate(state, step)
                if is_last:
                    check_good(metrics, step, bad_steps)
                    self.saver.save_last(state, step, is_bad=bool(int(metrics["n_bad"])))
                elif save:
                    self.saver.save(state, step)
        goodput.end_steps(num_steps, END)
        return state

    # ------------------------------------------------------------------ resuming

    def _check_newest(self) -> int | None:
        """Returns the newest good step, or the one to go back to; None if there is none. Raises UserError if this run
        can't continue from it, or there are too few tokens for all rows."""
        step = step_back.pick(self.checkpoints, self.step)
        self.status.saved(step)
        if step is not None:
            self.rollback.check_belongs(step, self.record)
            if warning := ignored(self.settings, self.checkpoints, step):
                say(f"WARNING: {warning}")
        elif logged := lines_of(self.workdir, "train"):
            say(f"WARNING: metrics.jsonl has step {max(logged)}, and there is no checkpoint: the run starts over")
        describe(self.store)
        self._streams(self.rollback.schedule_at(step))
        return step

    def _state_at(self, step: int | None) -> TrainState:
        """Returns the state of a checkpoint, or the first state for None. From here on, its schedule decides which data
        is read."""
        self.saver.begin(self.rollback.schedule_at(step))
        self.checkpoints.begin(step)
        self.evaluated = {at: loss for at, loss in self.evaluated.items() if at <= (step or 0)}
        return state_at(step, self.saver.schedule, self.checkpoints, self.settings, self.mesh, self.warm)

    def _open_logs(self, state: TrainState, first_step: int) -> None:
        """Records what this start has changed, and opens the files that are written during training."""
        settings, workdir, config = self.settings, self.workdir, self.settings.train
        if self.step is not None:
            step_back.set_aside_after(workdir, self.checkpoints, self.step)
        if is_process_zero():
            record_start(workdir, settings, self.store.vocab(), first_step, learning_rate)
        writer = MetricsWriter(workdir, settings.metrics, dataclasses.asdict(settings), enabled=is_process_zero())
        self.writer = self.opened.enter_context(contextlib.closing(writer))
        self.log = TrainingLog(
            writer,
            self.status,
            Speed(
                first_step,
                config.num_steps,
                config.batch_size * config.update_len,
                **dataclasses.asdict(yardstick(settings, self.mesh)),
            ),
            num_steps=config.num_steps,
            every_steps=config.log_every_steps,
            detail_every_steps=config.detail_every_steps,
            tokens_per_byte=self.store.tokens_per_byte("train"),
        )
        self.evaluated = own_losses(workdir, settings, self.store, self.checkpoints.identity)
        self.checkpoints.know_losses(self.evaluated)
        self.result.begin(first_step, lambda: self.saver.schedule, self.evaluated)
        self.profiler = self.opened.enter_context(contextlib.closing(Profiler(workdir, settings.profile, self.goodput)))
        describe_state(state, self.mesh)

    def _feed(self) -> Feed:
        """Returns the feed of the current data schedule."""
        config, data, schedule = self.settings.train, self.settings.data, self.saver.schedule
        sizes = config.batch_size, config.update_len, data.num_threads, data.prefetch_batches
        return Feed(self.split, self._streams(schedule), self.mesh, *sizes, schedule.now.update, schedule.now.cuts)

    def _streams(self, schedule: DataSchedule) -> StagedStreams:
        """Returns the streams of a data schedule. Raises UserError if there are too few tokens for all rows."""
        return streams_of(schedule, self.split, self.settings.seed)

    def _compiled(self, first_step: int) -> TrainStep:
        if self.step_fn is None:
            with self.goodput.on(COMPILE):
                step_fn = self.step_fn = compiled_train_step(self.tried, self.mesh)
            self.profiler.keep_operations(lambda: operations(step_fn.as_text()))
            self.log.restart(first_step)  # so that compiling does not count in the speed
            self.preemption.can_save = True
        return self.step_fn

    def _evaluates_at(self, step: int) -> bool:
        return bool(self.evaluator) and step > 0 and is_every(self.settings.eval.every_steps, step)

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Evaluates the state. Raises Preempted if the run is asked to end meanwhile."""

        def told_to_stop() -> bool:
            asked = self.stop.now()
            if asked == SAVE:
                self.saver.save(state, step, retain_all=True)  # as save_and_leave does
            return asked == STOP

        assert self.evaluator is not None
        with self.goodput.on(EVALUATION), self.log.paused():
            result = self.evaluator.evaluate(weights_in_use(state), told_to_stop)
        if result is None:
            self.saver.save_and_leave(state, step)
        report(result, step, "validation")
        weights = "raw" if state.ema is None else "ema"
        about = subject(self.settings, self.store, self.checkpoints.identity(step), weights)
        self.writer.write(step, "validation", result.numbers() | about)
        self.result.evaluated(step, result.numbers() | about)
        self.evaluated[step] = result.loss
        self.checkpoints.know_losses({step: result.loss})

    def _finish(self, state: TrainState, last_step: int) -> None:
        """Runs the last evaluation and draws a sample."""
        evaluates = self.settings.eval.at_end or is_every(self.settings.eval.every_steps, last_step)
        if self.evaluator and evaluates and not decided_by_process_zero(last_step in self.evaluated):
            self._evaluate(state, last_step)
        self.preemption.can_save = False  # everything is saved
        self.stop.close()
        if self.settings.sample.length:
            params = on_one_device(weights_in_use(state), self.mesh)
            on_process_zero(lambda: keep_sample(self.settings, self.workdir, params, last_step))
        say(f"done: {self.workdir}")
