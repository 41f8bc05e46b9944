"""--mode=eval: the loss of complete documents, each with its full context.

Documents are laid end to end on rows (see PackedDocuments); every row's state is carried from update to update, so a
token is predicted from everything before it in its document, however long. config.eval.cache=off shows the value of the
compressed cache: it uses the same parameters, with attention that ends with the window.
"""

import abc
import dataclasses
import math
import time
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tvq_pod.config.settings import Settings
from tvq_pod.data.loader import Feed
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.open import words_of
from tvq_pod.data.store import TokenStore
from tvq_pod.data.streams import PADDING, PackedDocuments
from tvq_pod.host.terminal import say
from tvq_pod.inference.by_position import BUCKET, Positions
from tvq_pod.inference.recall import Recall, RecallCounter, RecallSums
from tvq_pod.nn.axes import placed_by
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.deadlines import waiting
from tvq_pod.parallel.mesh import check_divides, compiler_options, n_row_shards
from tvq_pod.parallel.sharding import (
    OnMesh,
    batch_sharding,
    replicated,
    shardings_of,
)
from tvq_pod.run.metrics import LOG_2


@dataclasses.dataclass(frozen=True)
class Result:
    """Results of one evaluation."""

    loss: float  # nats per token, including end-of-document
    bits_per_byte: float  # the same loss, in bits, over the bytes of the documents' text
    word_perplexity: float | None  # exp(the same loss per word, as counted by PG-19's authors); None: other corpora
    tokens: int  # predicted tokens
    documents: int
    padding: float | None  # share of the computed positions that is padding; None if it was not counted
    seconds: float
    by_position: Positions  # loss by position in the document
    by_document: np.ndarray | None = None  # float64 [n_documents]: nats of each document of the split, NaN if not read
    recall: Recall | None = None  # accuracy by distance from the key, for a corpus of data/recall.py

    def numbers(self) -> dict:
        """All numbers except by_position and by_document, as in metrics.jsonl."""
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del numbers["by_position"], numbers["by_document"], numbers["recall"]
        numbers |= self.recall.numbers() if self.recall else {}
        return {name: value for name, value in numbers.items() if value is not None}


def make_eval_state(settings: Settings, mesh: jax.sharding.Mesh, n_rows: int) -> dict:
    """The state of rows that have read nothing, sharded over the mesh."""
    shardings = _state_shardings(settings.model, mesh, n_rows)
    return jax.jit(lambda: Transformer.initial_state(settings.model, n_rows), out_shardings=shardings)()


def _state_shardings(config: TransformerConfig, mesh: jax.sharding.Mesh, n_rows: int):
    shapes = jax.eval_shape(lambda: Transformer.initial_state(config, n_rows))
    return shardings_of(Transformer.state_axes(config), shapes, mesh)


def make_eval_step(settings: Settings, mesh: jax.sharding.Mesh, n_rows: int, with_hits: bool = False):
    """The compiled step: (params, state, batch) -> (state, losses), with hits as a third result; the state is donated.

    batch: see `Feed.batches`. losses: nats, float32 [B, T], 0 on padding; complete on every process, which adds them as
    doubles: in float32 the sum of so many would be inaccurate. hits, if with_hits: bool [B, T], whether the target is
    the likeliest token; they need all logits at once.
    """
    config = eval_model(settings)
    shardings = _state_shardings(config, mesh, n_rows)

    def eval_step(params, state, batch):
        targets = batch["targets"]
        inputs = (batch["inputs"], batch["doc_ids"], None, None if with_hits else targets)
        with placed_by(OnMesh(mesh, settings.mesh.fsdp)):
            state, out = Transformer(config).apply({"params": params}, state, *inputs)
        if not with_hits:
            return state, out["losses"] * batch["loss_mask"]
        logits = cast(jax.Array, out["logits"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return state, losses * batch["loss_mask"], jnp.argmax(logits, axis=-1) == targets

    return jax.jit(
        eval_step,
        in_shardings=(None, shardings, batch_sharding(mesh)),
        out_shardings=(shardings, *[replicated(mesh)] * (1 + with_hits)),
        donate_argnums=1,
        compiler_options=compiler_options(mesh),
    )


def eval_model(settings: Settings) -> TransformerConfig:
    has_cache = settings.model.agg_cache and settings.eval.cache == "on"
    return settings.model.replace(is_train=False, agg_cache=has_cache)


class SplitEvaluator(abc.ABC):
    """Evaluates parameters on one split; compiled once, and used any number of times. The base class of all kinds."""

    def __init__(
        self,
        store: TokenStore | Mixture,
        split: str,
        plan: PackedDocuments,
        recall: RecallCounter | RecallSums | None,
        per_document: bool,
    ):
        """plan: how the split's documents are laid out. recall: counts recalled values, in a corpus that has them.
        per_document: whether losses are also summed for each document."""
        self._padding: float | None = None
        self._recall = recall
        documents = store.split(split)
        self._plan, self._per_document, self._n_documents = plan, per_document, len(documents.doc_bytes)
        self._n_bytes = int(documents.doc_bytes[plan.documents].sum())
        self._n_words = words_of(store, split) if len(plan.documents) == self._n_documents else 0
        self._n_tokens = plan.tokens_by_position(BUCKET)

    @property
    def n_tokens(self) -> int:
        """The number of predicted tokens."""
        return self._plan.n_tokens

    def evaluate(self, params: dict, told_to_stop: Callable[[], bool] = lambda: False) -> Result | None:
        """The loss over the split's documents (or as many as config.eval.max_tokens allows).

        told_to_stop is called after each step; if it returns True, the evaluation returns None.
        """
        began = time.monotonic()
        self._nats = np.zeros(len(self._n_tokens))
        self._by_document = np.full(self._n_documents, np.nan)
        self._by_document[self._plan.documents] = 0.0
        if self._recall:
            self._recall.clear()
        with waiting("a step of the evaluation") as deadline:

            def after_step() -> bool:
                deadline.renew()
                return told_to_stop()

            if not self._counted(params, after_step):
                return None
        return self._result(time.monotonic() - began)

    @abc.abstractmethod
    def _counted(self, params: dict, told_to_stop: Callable[[], bool]) -> bool:
        """Adds the losses of all documents to _nats, and to _by_document if _per_document, and updates _recall; returns
        False if told to stop."""

    def _result(self, seconds: float) -> Result:
        total, tokens = float(self._nats.sum()), self._plan.n_tokens
        return Result(
            loss=total / tokens,
            bits_per_byte=total / LOG_2 / self._n_bytes,
            word_perplexity=_exp(total / self._n_words) if self._n_words else None,
            tokens=tokens,
            documents=len(self._plan.documents),
            padding=self._padding,
            seconds=seconds,
            by_position=Positions(self._nats, self._n_tokens, self._n_bytes / tokens),
            by_document=self._by_document if self._per_document else None,
            recall=self._recall.result() if self._recall else None,
        )


class Evaluator(SplitEvaluator):
    """Evaluates documents that are laid end to end on rows, whose states are carried from update to update."""

    def __init__(
        self,
        settings: Settings,
        mesh: jax.sharding.Mesh,
        store: TokenStore | Mixture,
        split: str,
        per_document: bool = False,
    ):
        """per_document: whether losses are also summed for each document. Raises UserError if the split has no
        document."""
        given, self._update_len = settings.eval.batch_size, settings.eval.update_len or settings.train.update_len
        check_divides("config.eval.batch_size", given, mesh)
        self._settings, self._mesh, update_len = settings, mesh, self._update_len
        documents = store.split(split)
        starts, max_tokens = documents.starts, settings.eval.max_tokens
        if given:
            plan = PackedDocuments(starts, given, max_tokens)
        else:
            most = max(settings.train.batch_size, n_row_shards(mesh))
            plan = PackedDocuments.on_most_rows(starts, most, n_row_shards(mesh), update_len, max_tokens)
        recall = None
        if store.recall_values:
            recall = RecallCounter(documents, plan, update_len, settings.model.mem_len, store.recall_values)
        super().__init__(store, split, plan, recall, per_document)
        self._counter = recall
        self._padding = plan.padding(update_len)
        if self._padding > PADDING:
            say(
                f"{split}: {self._padding:.0%} of the positions will be padding on {plan.n_rows} rows, since the "
                f"longest document has {plan.longest:,} of {plan.n_tokens:,} tokens"
            )
        self._eval_step = make_eval_step(settings, mesh, plan.n_rows, bool(recall))
        data = settings.data
        self._feed = Feed(documents, plan, mesh, plan.n_rows, update_len, data.num_threads, data.prefetch_batches)

    def _counted(self, params: dict, told_to_stop: Callable[[], bool]) -> bool:
        state = make_eval_state(self._settings, self._mesh, self._plan.n_rows)
        ahead, n_done = [], 0
        n_steps = math.ceil(self._plan.row_len / self._feed.update_len)
        for batch in self._feed.batches(0, n_steps):
            state, *found = self._eval_step(params, state, batch)
            ahead.append(found)
            if len(ahead) > 1:  # the host is at most one step ahead: batches take memory
                self._nats += self._by_bucket(n_done, *ahead.pop(0))
                n_done += 1
            if told_to_stop():
                return False
        self._nats += self._by_bucket(n_done, *ahead.pop())
        return True

    def _by_bucket(self, step: int, losses: jax.Array, hits: jax.Array | None = None) -> np.ndarray:
        """Waits for a step, and counts its hits. Returns float64 [n]: sums of losses by position in the document,
        BUCKET positions each."""
        update_len = self._update_len
        nats = jax.device_get(losses)
        if self._counter and hits is not None:
            self._counter.add(step, nats, jax.device_get(hits))
        if self._per_document:
            for row in range(self._plan.n_rows):
                at = 0
                for segment in self._plan.segments(row, step * update_len, (step + 1) * update_len):
                    document = self._plan.document_of(row, segment)
                    self._by_document[document] += nats[row, at : at + segment.length].sum(dtype=np.float64)
                    at += segment.length
        positions = self._plan.positions(step * update_len, (step + 1) * update_len)
        return np.bincount(positions.ravel() // BUCKET, nats.ravel(), len(self._n_tokens))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
