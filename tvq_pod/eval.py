"""--mode=eval: loss of whole documents, each with its full context.

Documents are laid end to end on rows (see PackedDocuments); every row's state is carried from update to update, so a
token is predicted from all that came before it in its document, however long.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath

from tvq_pod.checkpoint import FINGERPRINT, Checkpoints, model_record
from tvq_pod.config import Settings
from tvq_pod.data.loader import global_batches
from tvq_pod.data.store import TokenStore
from tvq_pod.data.streams import PackedDocuments
from tvq_pod.errors import UserError
from tvq_pod.metrics import LOG_2, MetricsWriter
from tvq_pod.nn.axes import placed_by
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.mesh import check_divides, compiler_options, make_mesh
from tvq_pod.parallel.processes import is_first
from tvq_pod.parallel.sharding import (
    OnMesh,
    batch_sharding,
    replicated,
    shardings_of,
)
from tvq_pod.prepare import open_store, store_path
from tvq_pod.progress import say
from tvq_pod.train_state import abstract_train_state


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one evaluation."""

    loss: float  # nats a token, end-of-documents included
    bits_per_byte: float  # the same loss, in bits, over the bytes of the documents' text
    tokens: int  # predicted tokens
    documents: int
    seconds: float


def make_eval_state(settings: Settings, mesh: jax.sharding.Mesh, n_rows: int) -> dict:
    """The state of rows that have read nothing, spread over the mesh."""
    shardings = _state_shardings(settings.model, mesh, n_rows)
    return jax.jit(lambda: Transformer.initial_state(settings.model, n_rows), out_shardings=shardings)()


def _state_shardings(config: TransformerConfig, mesh: jax.sharding.Mesh, n_rows: int):
    shapes = jax.eval_shape(lambda: Transformer.initial_state(config, n_rows))
    return shardings_of(Transformer.state_axes(config), shapes, mesh)


def make_eval_step(settings: Settings, mesh: jax.sharding.Mesh, n_rows: int):
    """The compiled step: (params, state, batch) -> (state, sums); the state given is donated.

    batch: see `global_batches`. sums: float32 scalars: loss (nats) and tokens, over positions that are no padding.
    """
    config = settings.model.replace(is_train=False)
    shardings = _state_shardings(config, mesh, n_rows)

    def eval_step(params, state, batch):
        inputs = (batch["inputs"], batch["doc_ids"], None, batch["targets"])
        with placed_by(OnMesh(mesh, settings.mesh.fsdp)):
            state, out = Transformer(config).apply({"params": params}, state, *inputs)
        losses = out["losses"] * batch["loss_mask"]
        return state, dict(loss=jnp.sum(losses), tokens=jnp.sum(batch["loss_mask"]))

    return jax.jit(
        eval_step,
        in_shardings=(None, shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=1,
        compiler_options=compiler_options(mesh),
    )


class Evaluator:
    """Evaluates parameters on one split; compiled once, used as often as one likes."""

    def __init__(self, settings: Settings, mesh: jax.sharding.Mesh, store: TokenStore, split: str):
        """Raises UserError if the split has no document."""
        check_divides("config.eval.batch_size", settings.eval_rows, mesh)
        self._settings, self._mesh = settings, mesh
        self._split = store.split(split)
        self._plan = PackedDocuments(self._split.starts, settings.eval_rows, settings.eval.max_tokens)
        self._n_bytes = int(self._split.doc_bytes[self._plan.documents].sum())
        self._eval_step = make_eval_step(settings, mesh, settings.eval_rows)

    def evaluate(self, params: dict, told_to_stop: Callable[[], bool] = lambda: False) -> Result | None:
        """Loss over the split's documents (or as many as config.eval.max_tokens takes).

        told_to_stop is asked after each step; None is returned as soon as it says so.
        """
        began = time.monotonic()
        train, data = self._settings.train, self._settings.data
        state, sums = make_eval_state(self._settings, self._mesh, self._settings.eval_rows), []
        for batch in global_batches(
            self._split,
            self._plan,
            self._mesh,
            batch_size=self._settings.eval_rows,
            update_len=train.update_len,
            first_step=0,
            last_step=math.ceil(self._plan.row_len / train.update_len),
            threads=data.num_threads,
            ahead=data.prefetch_batches,
        ):
            state, sum_ = self._eval_step(params, state, batch)
            jax.block_until_ready(sums[-1:])  # the host runs ahead by one step, no more: batches take memory
            sums.append(sum_)
            if told_to_stop():
                return None
        sums = jax.device_get(sums)
        # Python's floats are doubles: sums of float32 over one step each, added exactly enough
        nats, tokens = sum(float(s["loss"]) for s in sums), sum(int(s["tokens"]) for s in sums)
        return Result(
            loss=nats / tokens,
            bits_per_byte=nats / LOG_2 / self._n_bytes,
            tokens=tokens,
            documents=len(self._plan.documents),
            seconds=time.monotonic() - began,
        )


def evaluate(settings: Settings, workdir: epath.Path, split: str, step: int | None) -> Result:
    """Evaluates a checkpoint of the run in `workdir`, prints the result, and adds it to metrics.jsonl.

    Needs no lock: it only reads checkpoints, and adds one line. So a run may be evaluated while it trains.
    """
    mesh = make_mesh(settings.mesh)
    check_divides("config.eval.batch_size", settings.eval_rows, mesh)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.pick(step)
    path = store_path(settings, workdir)
    if not TokenStore.exists(path):
        raise UserError(f"config.data.store={path}: is no token store; --mode=prepare makes one")
    store = open_store(settings, workdir)
    checkpoints.check(step, model_record(settings, store.vocab_name))
    if checkpoints.record(step)[FINGERPRINT] != store.fingerprint:
        say(f"{store.path} is not the corpus that the model was trained on")
    evaluator = Evaluator(settings, mesh, store, split)
    params = checkpoints.restore_params(step, abstract_train_state(settings, mesh).params)
    result = evaluator.evaluate(params)
    report(result, step, split)
    if is_first():
        print(json.dumps(dict(step=step, split=split, **dataclasses.asdict(result))))
    writer = MetricsWriter(workdir, dataclasses.replace(settings.metrics, wandb_project=""), enabled=is_first())
    writer.write(step, split, dataclasses.asdict(result))
    writer.close()
    checkpoints.close()
    return result


def report(result: Result, step: int, split: str) -> None:
    """Says a result in one line."""
    say(
        f"step {step}: {split} loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte, "
        f"over {result.tokens:,} tokens of {result.documents:,} documents ({result.seconds:.1f} s)"
    )
