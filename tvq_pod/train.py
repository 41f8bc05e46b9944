"""--mode=train: from a config to a trained model. Reads from top to bottom: check, prepare, restore, loop, finish."""

import contextlib
import dataclasses
import time

import jax
from etils import epath

from tvq_pod.checkpoint import Checkpoints, run_record
from tvq_pod.config import Settings, to_json
from tvq_pod.data.loader import global_batches
from tvq_pod.data.store import TokenStore
from tvq_pod.data.streams import TrainStreams
from tvq_pod.data.vocab import SentencePieceVocab
from tvq_pod.eval import Evaluator, report
from tvq_pod.metrics import MetricsWriter, bits_per_byte, check_packages, has_line
from tvq_pod.parallel.mesh import check_divides, check_rows, make_mesh, sizes
from tvq_pod.parallel.processes import decided_by_first, is_first, on_first
from tvq_pod.parallel.sharding import on_one_device
from tvq_pod.paths import write_whole
from tvq_pod.prepare import check_source, describe, open_store, store_path
from tvq_pod.progress import Speed, hours, say
from tvq_pod.sample import continuations, run_vocab
from tvq_pod.train_state import abstract_train_state, create_train_state, make_train_step
from tvq_pod.workdir import locked


def train(settings: Settings, workdir: epath.Path) -> None:
    """Trains to config.train.num_steps, from the newest checkpoint in `workdir` if there is one."""
    # ------------------------------------------------- what can be refused before anything is written
    mesh = make_mesh(settings.mesh)
    check_rows(settings, mesh)
    check_divides("config.eval.batch_size", settings.eval.batch_size, mesh)
    check_packages(settings.metrics)
    if not TokenStore.exists(store_path(settings, workdir)):
        check_source(settings, workdir)
    with contextlib.ExitStack() as opened:
        on_first(lambda: opened.enter_context(locked(workdir)))
        on_first(lambda: open_store(settings, workdir))
        _train(settings, workdir, mesh, opened)


def _train(settings: Settings, workdir: epath.Path, mesh: jax.sharding.Mesh, opened: contextlib.ExitStack) -> None:
    """opened: closes what has threads or files of its own, however this ends."""
    config, is_writer = settings.train, is_first()
    # ------------------------------------------------- corpus
    store = open_store(settings, workdir)
    split = store.split("train")
    streams = TrainStreams(split.starts, config.batch_size, settings.seed)
    evaluator = _make_evaluator(settings, mesh, store)
    # ------------------------------------------------- checkpoint
    checkpoints = opened.enter_context(contextlib.closing(Checkpoints(workdir, keep=settings.checkpoint.keep)))
    record = run_record(settings, store.vocab_name, store.fingerprint)
    saved_steps = checkpoints.steps()
    if saved_steps:
        checkpoints.check(saved_steps[-1], record)
    describe(store)
    if saved_steps:
        state = checkpoints.restore(saved_steps[-1], abstract_train_state(settings, mesh))
        say(f"goes on from step {saved_steps[-1]} in {checkpoints.path}")
    else:
        state = create_train_state(settings, mesh)
    first_step = saved_steps[-1] if saved_steps else 0
    # ------------------------------------------------- nothing can be refused any more
    if is_writer and (first_step < config.num_steps or not (workdir / "config.json").exists()):
        if isinstance(store.vocab(), SentencePieceVocab):
            (workdir / "vocab.model").write_bytes((store.path / "vocab.model").read_bytes())
        write_whole(workdir / "config.json", to_json(settings))
    writer = MetricsWriter(workdir, settings.metrics, dataclasses.asdict(settings), enabled=is_writer)
    opened.enter_context(contextlib.closing(writer))
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(f"{n_params:,} parameters on {mesh.size} {jax.devices()[0].device_kind} device(s), mesh {sizes(mesh)}")
    # ------------------------------------------------- loop
    tokens_per_byte = store.tokens_per_byte("train")
    batches = global_batches(
        split,
        streams,
        mesh,
        batch_size=config.batch_size,
        update_len=config.update_len,
        first_step=first_step,
        last_step=config.num_steps,
        threads=settings.data.num_threads,
        ahead=settings.data.prefetch_batches,
    )
    opened.enter_context(contextlib.closing(batches))
    step_fn, behind = None, None
    interval, waiting = [], None  # metrics since the last log, and those that are to be logged once the device moved on
    speed = None

    def log(step: int, metrics: list[dict]) -> None:
        values = _means(jax.device_get(metrics))  # waits for `step` to be done
        values |= speed.seen(step)
        values["bits_per_byte"] = bits_per_byte(values["loss"], tokens_per_byte)
        writer.write(step, "train", values)
        say(
            f"step {step:>{len(str(config.num_steps))}}/{config.num_steps}  loss {values['loss']:.4f}  "
            f"bits/byte {values['bits_per_byte']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"ETA {hours(values['eta_seconds'])}"
        )

    for step in range(first_step + 1, config.num_steps + 1):  # the number the state will have when the update is done
        batch = next(batches)
        if step_fn is None:
            began = time.monotonic()
            step_fn = make_train_step(settings, mesh).lower(state, batch).compile()
            say(f"compiled in {time.monotonic() - began:.1f} s; {_memory(step_fn)}")
            speed = Speed(first_step, config.num_steps, config.batch_size * config.update_len)
        state, metrics = step_fn(state, batch)
        interval.append(metrics)
        jax.block_until_ready(behind)  # the host runs ahead of the device by one step, no more: batches take memory
        behind = metrics
        if waiting:  # fetched only now that the device has its next step to do
            log(*waiting)
            waiting = None
        save = _due(step, settings.checkpoint.every_steps) or step == config.num_steps
        evaluate = evaluator and step < config.num_steps and _due(step, settings.eval.every_steps)
        if step % config.log_every_steps == 0 or save:
            waiting, interval = (step, interval), []
        if waiting and (save or evaluate):
            log(*waiting)
            waiting = None
        # What belongs to a step is written before its checkpoint: a run that goes on from there does not come back.
        if evaluate:
            _evaluate(evaluator, state.params, step, writer)
            speed.skip()
        if save:
            checkpoints.save(state, step, record)
    checkpoints.wait()
    # ------------------------------------------------- the end
    last_step = max(first_step, config.num_steps)
    if first_step >= config.num_steps:
        say(f"nothing to train: step {first_step} of config.train.num_steps={config.num_steps} is there")
    evaluate = settings.eval.at_end or _due(last_step, settings.eval.every_steps)
    if evaluator and evaluate and not decided_by_first(has_line(workdir, last_step, "validation")):
        _evaluate(evaluator, state.params, last_step, writer)
    if settings.sample.length:
        params = on_one_device(state.params, mesh)
        on_first(lambda: _sample(settings, workdir, params, last_step))
    say(f"done: {workdir}")


def _make_evaluator(settings: Settings, mesh: jax.sharding.Mesh, store: TokenStore) -> Evaluator | None:
    if not (settings.eval.every_steps or settings.eval.at_end):
        return None
    if not store.meta["splits"]["validation"]["n_documents"]:
        say("no document fell into the validation split: nothing will be evaluated; see config.data.validation_share")
        return None
    return Evaluator(settings, mesh, store, "validation")


def _evaluate(evaluator: Evaluator, params: dict, step: int, writer: MetricsWriter) -> None:
    result = evaluator.evaluate(params)
    report(result, step, "validation")
    writer.write(step, "validation", dataclasses.asdict(result))


def _sample(settings: Settings, workdir: epath.Path, params: dict, step: int) -> None:
    """Prints a sample, and keeps it in WORKDIR/samples."""
    vocab = run_vocab(settings, workdir)
    prompt = settings.sample.prompt.encode()
    text = "".join(next(continuations(params, settings.model, vocab, settings.sample, [prompt])))
    path = workdir / "samples" / f"step_{step}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    say(f"a sample, kept in {path}:")
    print(text, flush=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _means(metrics: list[dict]) -> dict:
    return {name: float(sum(m[name] for m in metrics) / len(metrics)) for name in metrics[0]}


def _memory(compiled) -> str:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "memory unknown"
    gib = 2**30
    state, temp = analysis.argument_size_in_bytes / gib, analysis.temp_size_in_bytes / gib
    return f"a device holds {state:.2f} GiB of state and batch, and {temp:.2f} GiB while it computes"
