"""The evaluator that a run's settings call for."""

from collections.abc import Callable

import jax
import numpy as np

from tvq_pod.config.settings import Settings
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.store import TokenStore
from tvq_pod.data.streams import PackedDocuments
from tvq_pod.host.terminal import say
from tvq_pod.inference.by_position import BUCKET
from tvq_pod.inference.evaluator import Evaluator, SplitEvaluator
from tvq_pod.inference.recall import RecallSums
from tvq_pod.inference.scorer import Scorer
from tvq_pod.parallel.mesh import check_divides


def make_evaluator(
    settings: Settings, mesh: jax.sharding.Mesh, store: TokenStore | Mixture, split: str, per_document: bool = False
) -> SplitEvaluator:
    """Makes the evaluator of a split. per_document: whether losses are also summed for each document. Raises UserError
    if the split has no document."""
    if settings.model.attn_type == "full" and settings.eval.update_len:
        return QuadraticEvaluator(settings, mesh, store, split, per_document)
    return Evaluator(settings, mesh, store, split, per_document)


def validation_evaluator(
    settings: Settings, mesh: jax.sharding.Mesh, store: TokenStore | Mixture
) -> SplitEvaluator | None:
    """The evaluator of a training run; None if it never evaluates, or has nothing to evaluate."""
    if not (settings.eval.every_steps or settings.eval.at_end):
        return None
    if not store.meta["splits"]["validation"]["n_documents"]:
        say(
            "no document fell into the validation split, so nothing will be evaluated; "
            "raise config.data.validation_share, or give more documents"
        )
        return None
    return make_evaluator(settings, mesh, store, "validation")


class QuadraticEvaluator(SplitEvaluator):
    """Evaluates quadratic attention, which keeps only its window from one update to the next: every document begins a
    new update, of at most config.eval.update_len tokens."""

    def __init__(
        self, settings: Settings, mesh: jax.sharding.Mesh, store: TokenStore | Mixture, split: str, per_document: bool
    ):
        """See `make_evaluator`."""
        check_divides("config.eval.batch_size", settings.eval.batch_size, mesh)
        documents = store.split(split)
        plan = PackedDocuments(documents.starts, 1, settings.eval.max_tokens)
        self._sums = RecallSums(settings.model.mem_len, store.recall_values) if store.recall_values else None
        super().__init__(store, split, plan, self._sums, per_document)
        self._scorer = Scorer(settings, mesh, shows_progress=False)
        self._tokens, self._starts = documents.tokens, documents.starts
        limit = settings.eval.update_len
        if self._plan.longest > limit:
            say(
                f"config.eval.update_len={limit}: the longest document has {self._plan.longest:,} tokens; documents "
                "longer than the limit are read in pieces, each of which sees only the window before it"
            )

    def _counted(self, params: dict, told_to_stop: Callable[[], bool]) -> bool:
        lengths, n_rows = np.diff(self._starts), self._scorer.most_rows
        order = self._plan.documents[np.argsort(-lengths[self._plan.documents], kind="stable")]
        for at in range(0, len(order), n_rows):
            group = order[at : at + n_rows]
            texts = [np.asarray(self._tokens[self._starts[n] : self._starts[n + 1]].read().result()) for n in group]
            scores = self._scorer.score(params, texts, with_hits=bool(self._sums))
            for document, text, (nats, hits) in zip(group, texts, scores, strict=True):
                self._by_document[document] = nats.sum(dtype=np.float64)
                self._nats += np.bincount(np.arange(len(nats)) // BUCKET, nats, len(self._nats))
                if self._sums:
                    self._sums.add(self._sums.classes(text, np.zeros(len(text), np.int32)), nats, hits)
            if told_to_stop():
                return False
        return True
