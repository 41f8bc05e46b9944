"""Runs one model on many documents at once, on every device of a job: their losses, or text that continues them.

Documents are token ids in memory, of any length. All processes call everything with the same arguments and get the same
results.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from tvq_pod.config.settings import SampleSettings, Settings
from tvq_pod.data.vocab import Vocab
from tvq_pod.errors import UserError
from tvq_pod.inference.continuous import ContinuousSampler, Request
from tvq_pod.inference.evaluator import eval_model
from tvq_pod.inference.scorer import Scorer, progress
from tvq_pod.inference.stop import StopText
from tvq_pod.inference.text import text_sampling
from tvq_pod.parallel.deadlines import waiting


class BatchedModel:
    """A model whose parameters are sharded over a mesh. Compiled programs are kept between calls."""

    def __init__(
        self, settings: Settings, params: dict, vocab: Vocab, mesh: jax.sharding.Mesh, *, shows_progress: bool
    ):
        """settings: config.eval.cache says whether the compressed cache is used, config.eval.batch_size and
        config.train.batch_size how many rows are read side by side at most. shows_progress: shows a progress bar on
        stderr."""
        self._settings, self._params, self._vocab, self._mesh = settings, params, vocab, mesh
        self._shows = shows_progress
        self._scorer = Scorer(settings, mesh, shows_progress=shows_progress)
        self._sampler = functools.cache(self._make_sampler)

    def score(self, documents: Sequence[np.ndarray], *, with_hits: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `Scorer.score`."""
        return self._scorer.score(self._params, documents, with_hits=with_hits)

    def check_continues(self) -> None:
        """Raises UserError for a model whose full context is not available in sampling."""
        if self._settings.model.attn_type == "full":
            raise UserError("config.model.attn_type=full: a sampler keeps only its window; choose tasks that score")

    def continue_until(
        self, prompts: Sequence[np.ndarray], *, stops: Sequence[str], length: int, temperature: float, top_p: float
    ) -> list[str]:
        """Returns new text for documents that begin with `prompts`, integers [n] each.

        A text ends before the first of the strings `stops` (none of them empty) that occurs in it, at the end of the
        document, or after `length` tokens. temperature, top_p: see `draw_tokens`. The random numbers are those of
        config.sample.seed.
        """
        if not prompts:
            return []
        texts = [StopText(self._vocab, stops, prompt) for prompt in prompts]
        bar = progress(len(prompts), "generating", "text", self._shows)
        with waiting("a step of the sampler") as deadline, bar:

            def is_last(text: StopText, token: int) -> bool:
                deadline.renew()
                return text.add(token)

            requests = [
                Request(prompt, number, length, functools.partial(is_last, text))
                for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            ]
            sampler = self._sampler(len(prompts), temperature, top_p)
            for _ in sampler.sample_each(self._params, requests, self._settings.sample.seed):
                deadline.renew()
                bar.update()
        return [text.text() for text in texts]

    def _make_sampler(self, n_rows: int, temperature: float, top_p: float) -> ContinuousSampler:
        config = eval_model(self._settings)
        how = text_sampling(config, self._vocab, SampleSettings(temperature=temperature, top_p=top_p))
        return ContinuousSampler(config, how, n_rows, list(self._mesh.devices.flat))
