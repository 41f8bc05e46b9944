"""Computes the losses of many documents, token ids in memory of any length, on every device of a job."""

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tensorstore
import tqdm

from tvq_pod.config.settings import Settings
from tvq_pod.data.loader import joined, local_part
from tvq_pod.data.streams import BatchSource, PackedDocuments
from tvq_pod.inference.evaluator import make_eval_state, make_eval_step
from tvq_pod.parallel.deadlines import waiting
from tvq_pod.parallel.mesh import n_row_shards
from tvq_pod.parallel.processes import is_process_zero
from tvq_pod.parallel.sharding import batch_sharding

LOGIT_BYTES = 2**30  # the most bytes of one step's logits on one device, when hits are requested


class Scorer:
    """Reads documents end to end on rows, with carried state, as `evaluator.py` reads a split. Compiled programs are
    kept between calls. All processes of a job make the same calls, and get the same results."""

    def __init__(self, settings: Settings, mesh: jax.sharding.Mesh, *, shows_progress: bool):
        """settings: config.eval.cache says whether the compressed cache is used, config.eval.batch_size and
        config.train.batch_size how many rows are read side by side at most. shows_progress: shows a progress bar on
        stderr."""
        self._settings, self._mesh, self._shows = settings, mesh, shows_progress
        self._eval_step = functools.cache(functools.partial(make_eval_step, settings, mesh))

    def score(
        self, params: dict, documents: Sequence[np.ndarray], *, with_hits: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns, for each document, integers [n], the loss of each token given all tokens before it, in nats, float32
        [n], and whether the token was the likeliest, bool [n]; all False unless with_hits.

        Quadratic attention keeps only its window from one update to the next. So its documents are read in one update
        each, as many side by side as there are rows; those longer than config.eval.update_len, unless it is 0, in
        several."""
        if self._settings.model.attn_type != "full":
            return self._scored(params, documents, with_hits)
        found = [(np.zeros(0, np.float32), np.zeros(0, bool))] * len(documents)
        order = sorted(range(len(documents)), key=lambda number: -len(documents[number]))
        while order:
            longest = len(documents[order[0]])
            longest = min(longest, self._settings.eval.update_len or longest)
            n_rows = self._rows_of_logits(longest) if with_hits else self.most_rows
            group, order = order[:n_rows], order[n_rows:]
            scores = self._scored(params, [documents[number] for number in group], with_hits)
            for number, score in zip(group, scores, strict=True):
                found[number] = score
        return found

    def _scored(
        self, params: dict, documents: Sequence[np.ndarray], with_hits: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        starts = np.cumsum([0, *map(len, documents)])
        nats, hits = np.zeros(starts[-1], np.float32), np.zeros(starts[-1], bool)
        if starts[-1]:
            plan, update_len = self._plan(np.unique(starts), with_hits)
            tokens = np.concatenate(documents).astype(np.int32)
            for step, (losses, is_likeliest) in enumerate(self._steps(params, tokens, plan, update_len, with_hits)):
                for row in range(plan.n_rows):
                    at = 0
                    for segment in plan.segments(row, step * update_len, (step + 1) * update_len):
                        stop, end = at + segment.length, segment.start + segment.length
                        nats[segment.start : end] = losses[row, at:stop]
                        hits[segment.start : end] = is_likeliest[row, at:stop]
                        at = stop
        return [(nats[begin:end], hits[begin:end]) for begin, end in itertools.pairwise(starts)]

    @property
    def most_rows(self) -> int:
        """The most documents that are read side by side."""
        settings, n_shards = self._settings, n_row_shards(self._mesh)
        most = max(settings.eval.batch_size or settings.train.batch_size, n_shards)
        return most - most % n_shards

    def _rows_of_logits(self, n_tokens: int) -> int:
        """The number of rows whose logits fit, with `n_tokens` tokens each."""
        n_shards = n_row_shards(self._mesh)
        return min(
            self.most_rows, n_shards * max(1, LOGIT_BYTES // (4 * max(1, n_tokens) * self._settings.model.n_vocab))
        )

    def _plan(self, starts: np.ndarray, with_hits: bool) -> tuple[PackedDocuments, int]:
        """The layout of documents on rows, and the number of tokens that one step reads from each row, which has few
        different values so that few programs are compiled."""
        settings, n_shards = self._settings, n_row_shards(self._mesh)
        block_len = settings.model.block_len
        most_blocks = (settings.eval.update_len or settings.train.update_len) // block_len
        if settings.model.attn_type == "full":
            n_blocks = 2 ** math.ceil(math.log2(math.ceil(int(np.diff(starts).max()) / block_len)))
            n_blocks = min(n_blocks, settings.eval.update_len // block_len or n_blocks)
            return PackedDocuments(starts, n_shards * math.ceil((len(starts) - 1) / n_shards)), n_blocks * block_len
        most = self.most_rows
        if with_hits:
            fit = max(1, LOGIT_BYTES // (4 * block_len * settings.model.n_vocab))  # blocks of one row
            most = self._rows_of_logits(block_len)
            most_blocks = min(most_blocks, max(1, fit * n_shards // most))
        longest = max(int(np.diff(starts).max()), int(starts[-1]) / most)
        n_blocks = min(2 ** math.ceil(math.log2(math.ceil(longest / block_len))), most_blocks)
        update_len = n_blocks * block_len
        return PackedDocuments.on_most_rows(starts, most, n_shards, update_len), update_len

    def _steps(
        self, params: dict, tokens: np.ndarray, plan: PackedDocuments, update_len: int, with_hits: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Losses and hits of each step, [B, T]."""
        sharding, shape = batch_sharding(self._mesh), (plan.n_rows, update_len)
        rows, parts = local_part(sharding, shape)
        n_steps = math.ceil(plan.row_len / update_len)
        source = BatchSource(tensorstore.array(tokens), plan, rows, update_len, 0, n_steps, parts)
        eval_step = self._eval_step(plan.n_rows, with_hits)
        state = make_eval_state(self._settings, self._mesh, plan.n_rows)
        ahead = []
        with waiting("a step of the evaluation") as deadline, progress(n_steps, "scoring", "step", self._shows) as bar:
            for step in range(n_steps):
                read = source[step].items()
                batch = {name: joined(sharding, shape, rows, parts, array) for name, array in read}
                state, *found = eval_step(params, state, batch)
                ahead.append(found)
                while len(ahead) > (step + 1 < n_steps):  # the host is at most one step ahead
                    losses, *is_likeliest = jax.device_get(ahead.pop(0))
                    yield losses, is_likeliest[0] if with_hits else np.zeros(shape, bool)
                    deadline.renew()
                    bar.update()


def progress(total: int, what: str, unit: str, shows: bool) -> tqdm.tqdm:
    """A bar of process 0's progress on stderr, if `shows`."""
    return tqdm.tqdm(
        total=total, desc=what, unit=unit, file=sys.stderr, disable=not (shows and is_process_zero()),
        delay=5, mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
