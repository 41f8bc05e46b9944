"""--mode=eval: the loss of complete documents of one split, each with its full context; or suites of long documents."""

import dataclasses
import json

import numpy as np
from etils import epath

from tvq_pod.config.identity import FINGERPRINT, RUN_IDENTITY, model_record
from tvq_pod.config.settings import Settings
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.open import open_store
from tvq_pod.data.store import TokenStore, store_path
from tvq_pod.errors import UserError
from tvq_pod.host.files import Unwritten
from tvq_pod.host.terminal import say
from tvq_pod.inference.by_document import check_table, write_documents
from tvq_pod.inference.by_position import write_positions
from tvq_pod.inference.evaluation_lines import report, subject
from tvq_pod.inference.evaluator import Result
from tvq_pod.inference.evaluators import make_evaluator
from tvq_pod.inference.opened import OpenedRun
from tvq_pod.inference.recall import write_recall
from tvq_pod.inference.suites import measure, write_found
from tvq_pod.parallel.attention import attention_line, check_attention, with_tried_attention
from tvq_pod.parallel.mesh import check_divides, make_mesh
from tvq_pod.parallel.processes import is_process_zero
from tvq_pod.run.checkpoint_reader import IMPORTED, CheckpointReader
from tvq_pod.run.metrics import MetricsWriter
from tvq_pod.training.step import abstract_train_state


def evaluate(
    settings: Settings, workdir: epath.Path, split: str, step: int | None, per_document: epath.Path | None = None
) -> Result:
    """Evaluates a checkpoint of the run in `workdir`, prints the result, and adds it to metrics.jsonl.

    per_document: a file for the loss of each document.

    It needs no lock, since it only reads checkpoints and adds one line, so a run may be evaluated while it trains.
    """
    if per_document is not None:
        check_table(per_document)
    mesh = make_mesh(settings.mesh)
    check_attention(settings.model, mesh)
    check_divides("config.eval.batch_size", settings.eval.batch_size, mesh)
    checkpoints = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
    step = checkpoints.pick(step)
    path = store_path(settings, workdir)
    if not settings.data.mixture and not TokenStore.exists(path):
        raise UserError(f"config.data.store={path}: is not a token store; --mode=prepare makes one")
    store = open_store(settings, workdir)
    checkpoints.check(step, model_record(settings, store.vocab_name))
    record = checkpoints.record(step)
    trained_on = record[IMPORTED]["fingerprint"] if IMPORTED in record else record[FINGERPRINT]
    if earlier := store.as_of(trained_on) if trained_on != store.fingerprint else None:
        say(f"{store.path} has grown since: {earlier.n_parts} of its {store.n_parts} parts are the run's data")
        store = earlier
    if trained_on not in (store.fingerprint, ""):
        say(f"{store.path} is not the corpus that the model was trained on")
    tried = with_tried_attention(settings, mesh)
    say(attention_line(tried.model, mesh))
    evaluator = make_evaluator(tried, mesh, store, split, per_document is not None)
    weights = checkpoints.weights(step, settings.eval.weights)
    params = checkpoints.restore_params(step, abstract_train_state(settings, mesh).params, weights)
    result = evaluator.evaluate(params)
    assert result is not None, "it was not told to stop"
    name = _name(settings, split, record, is_other=checkpoints.has_ema(step) and weights == "raw")
    report(result, step, name)
    numbers = result.numbers() | subject(settings, store, checkpoints.identity(step), weights)
    if is_process_zero():
        for line in [*result.by_position.table(), *(result.recall.table() if result.recall else ())]:
            say(line)
        _write(settings, workdir, numbers, result, step, name)
        if per_document is not None and result.by_document is not None:
            _write_documents(per_document, result.by_document, store, split)
        print(json.dumps(dict(step=step, split=name, **numbers)), flush=True)
    checkpoints.close()
    return result


def evaluate_suites(settings: Settings, workdir: epath.Path, suites: list[str], step: int | None) -> None:
    """Evaluates a checkpoint of the run in `workdir` on long documents that are generated for the purpose, see
    inference/suites.py, without a store. Prints the results, writes them into WORKDIR/eval, and adds a line for each
    suite to metrics.jsonl."""
    run = OpenedRun(settings, workdir, step, "--suite")
    record, about = run.checkpoints.record(run.step), dict(checkpoint=run.checkpoints.identity(run.step))
    about |= dict(dtype=str(settings.model.dtype), weights=run.weights)
    is_other = run.checkpoints.has_ema(run.step) and run.weights == "raw"
    for suite in suites:
        found, name = measure(suite, run, settings), _name(settings, suite, record, is_other)
        if not is_process_zero():
            continue
        for line in (f"{suite}:", *found.table()):
            say(line)
        unwritten, file = Unwritten(), f"step_{run.step}_{name}"
        with unwritten.unless(workdir / "metrics.jsonl"):
            writer = MetricsWriter(workdir, dataclasses.replace(settings.metrics, wandb_project=""))
            writer.write(run.step, name, found.numbers() | about)
            writer.close()
        with unwritten.unless(workdir / "eval" / f"{file}.tsv"):
            write_found(found, workdir / "eval", file)
        unwritten.tell()
        print(json.dumps(dict(step=run.step, suite=name, **found.numbers())), flush=True)
    run.checkpoints.close()


def _write_documents(path: epath.Path, nats: np.ndarray, store: TokenStore | Mixture, split: str) -> None:
    unwritten = Unwritten()
    with unwritten.unless(path):
        write_documents(path, nats, store.split(split), store.names(split))
        say(f"loss of each document: {path}")
    unwritten.tell()


def _write(settings: Settings, workdir: epath.Path, numbers: dict, result: Result, step: int, name: str) -> None:
    """Adds a line to metrics.jsonl, and writes the tables by position and by distance. Prints which files could not be
    written: the folder may be read-only."""
    unwritten = Unwritten()
    with unwritten.unless(workdir / "metrics.jsonl"):
        writer = MetricsWriter(workdir, dataclasses.replace(settings.metrics, wandb_project=""))
        writer.write(step, name, numbers)
        writer.close()
    with unwritten.unless(workdir / "eval" / f"step_{step}_{name}.tsv"):
        write_positions(result.by_position, workdir / "eval", f"step_{step}_{name}")
    if result.recall:
        with unwritten.unless(workdir / "eval" / f"step_{step}_{name}_recall.tsv"):
            write_recall(result.recall, workdir / "eval", f"step_{step}_{name}_recall")
    unwritten.tell()


def _name(settings: Settings, split: str, record: dict, is_other: bool) -> str:
    """Returns the name of an evaluation's lines and files: the split, and what differs from training's evaluations.

    is_other: whether it evaluates other weights than training does.
    """
    parts = [split, *(["weights_raw"] if is_other else []), *(["cache_off"] if settings.eval.cache == "off" else [])]
    for field in RUN_IDENTITY:
        value = str(getattr(settings.model, field))
        if record.get(f"config.model.{field}") != value:
            parts.append(f"{field}_{value}")
    return "_".join(parts)
