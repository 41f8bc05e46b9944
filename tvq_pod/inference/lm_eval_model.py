"""The model's interface to lm-evaluation-harness, and how several processes answer its requests to process 0.

The harness runs on process 0 alone. The others wait for its requests in `serve`, and compute their part of each.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tvq_pod.data.vocab import END_OF_DOC, Vocab, pieces
from tvq_pod.errors import UserError
from tvq_pod.inference.batched import BatchedModel
from tvq_pod.parallel.deadlines import still_working, waiting
from tvq_pod.parallel.processes import bytes_from_process_zero

MAX_GEN_TOKS = 256  # for tasks that give no number; the harness's own default for Hugging Face models
HONORED = {"until", "do_sample", "max_gen_toks", "temperature", "top_p"}
WITHOUT_EFFECT = {"top_k", "min_p"}  # if the likeliest token is taken


class SharedModel:
    """A BatchedModel whose methods process 0 calls for all processes of the job."""

    def __init__(self, model: BatchedModel):
        self._model = model

    def score(self, documents: Sequence[np.ndarray], *, with_hits: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """See BatchedModel. Call it on process 0."""
        self._tell("score", documents, with_hits=with_hits)
        return self._model.score(documents, with_hits=with_hits)

    def continue_until(self, prompts: Sequence[np.ndarray], **how) -> list[str]:
        """See BatchedModel. Call it on process 0. Raises UserError if a sampler can't see the full context."""
        self._model.check_continues()
        self._tell("continue_until", prompts, **how)
        return self._model.continue_until(prompts, **how)

    def end(self) -> None:
        """Ends `serve` on the other processes. Call it on process 0."""
        bytes_from_process_zero(b"")

    def serve(self) -> None:
        """Computes with process 0 until that calls `end`. Call it on all other processes."""
        while message := self._next():
            header, _, content = message.partition(b"\n")
            method, lengths, how = json.loads(header)
            tokens = np.split(np.frombuffer(content, np.int32), np.cumsum(lengths)[:-1]) if lengths else []
            getattr(self._model, method)(tokens, **how)

    @staticmethod
    def _next() -> bytes:
        with waiting("the next requests of the evaluation harness", of_first=True):
            return bytes_from_process_zero(b"")

    @staticmethod
    def _tell(method: str, documents: Sequence[np.ndarray], **how) -> None:
        header = json.dumps([method, [len(document) for document in documents], how])
        content = b"".join(np.asarray(document, np.int32).tobytes() for document in documents)
        bytes_from_process_zero(header.encode() + b"\n" + content)


class HarnessModel(TemplateLM):
    """Answers the harness's requests. Documents may have any length, and are truncated only to max_length."""

    def __init__(self, model: SharedModel, vocab: Vocab, max_length: int | None, described: dict):
        """max_length: the most tokens that are read, predicted ones included; earlier ones are left out, as if the
        document began later. described: the description of the model in the results file."""
        super().__init__()
        self._model, self._vocab, self._max_length, self._described = model, vocab, max_length, described

    @property
    def eot_token_id(self) -> int:
        return END_OF_DOC

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Returns token ids. There are no special tokens to add: every document begins in the same way, see
        `read_row`."""
        still_working()
        parts = [self._vocab.encode(piece) for piece in pieces(string.encode(errors="replace"), self._vocab)]
        return np.concatenate(parts).tolist()

    def get_model_info(self) -> dict:
        """The description of the model in the results file."""
        return self._described

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Returns, for each continuation given its context, the log-probability in nats, and whether each of its tokens
        is the likeliest. Raises UserError if max_length leaves no room for a continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = True, **kwargs) -> list[tuple[float, bool]]:
        """requests: (texts, context, continuation), the last two as token ids."""
        continuations = [continuation for _, _, continuation in requests]
        if self._max_length and (longest := max(map(len, continuations), default=0)) > self._max_length:
            raise UserError(
                f"--max_length={self._max_length}: a continuation has {longest} tokens; give {longest} or more, or "
                "leave it out"
            )
        documents = [self._document(context, continuation) for _, context, continuation in requests]
        scores = self._model.score(documents, with_hits=True)
        found: list[tuple[float, bool]] = []
        for (nats, hits), continuation in zip(scores, continuations, strict=True):
            predicted = slice(len(nats) - len(continuation), None)
            found.append((-float(nats[predicted].sum(dtype=np.float64)), bool(hits[predicted].all())))
        return found

    def _document(self, context: list[int], continuation: list[int]) -> np.ndarray:
        begins = int(context[:1] == [END_OF_DOC])  # the harness's prefix, which every document has
        tokens = [*context[begins:], *continuation]
        return np.array(tokens[-self._max_length :] if self._max_length else tokens, np.int32)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each text, in nats: of each token given all tokens before it or, with max_length, in
        the harness's disjoint windows of that many tokens."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            length = self._max_length or max(1, len(tokens))
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=length, context_len=1)
            own = [make_disjoint_window(pair) for pair in pairs]
            windows += own
            owners += [owner] * len(own)
        documents = [self._document(context, continuation) for context, continuation in windows]
        sums = np.zeros(len(requests))
        scores = self._model.score(documents, with_hits=False)
        for owner, (_, continuation), (nats, _) in zip(owners, windows, scores, strict=True):
            sums[owner] -= nats[len(nats) - len(continuation) :].sum(dtype=np.float64)
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that continues each context, up to the first of the request's stop strings. Raises UserError for a
        request that the sampler does not support."""
        pairs = [cast(tuple[str, dict], request.args) for request in requests]
        asked = [self._asked(gen_kwargs) for _, gen_kwargs in pairs]
        texts = [""] * len(requests)
        for how in dict.fromkeys(asked):
            own = [index for index, other in enumerate(asked) if other == how]
            prompts = [self._prompt(self.tok_encode(pairs[index][0]), how[1]) for index in own]
            stops, length, temperature, top_p = how
            drawn = self._model.continue_until(
                prompts, stops=stops, length=length, temperature=temperature, top_p=top_p
            )
            for index, text in zip(own, drawn, strict=True):
                texts[index] = text
        return texts

    @staticmethod
    def _asked(gen_kwargs: dict) -> tuple[tuple[str, ...], int, float, float]:
        """The stop strings, the most new tokens, temperature and top_p of a request."""
        try:
            given: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, MAX_GEN_TOKS))
            temperature = float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0
            top_p = float(given.get("top_p", 1.0))
        except (TypeError, ValueError) as error:
            raise UserError(f"--tasks: a task has generation_kwargs that can't be read ({error})") from None
        for name, value, is_right, wanted in (
            ("max_gen_toks", given["max_gen_toks"], given["max_gen_toks"] >= 0, "at least 0"),
            ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("until", given["until"], all(isinstance(stop, str | None) for stop in given["until"]), "text"),
        ):
            if not is_right:
                raise UserError(f"--tasks: a task has generation_kwargs {name}={value}: must be {wanted}")
        unknown = given.keys() - HONORED - (set() if temperature else WITHOUT_EFFECT)
        for name in sorted(unknown):
            raise UserError(
                f"--tasks: a task has generation_kwargs {name}={given[name]}, which is not supported; supported are "
                + ", ".join(sorted(HONORED))
            )
        stops = tuple(stop for stop in given["until"] if stop)
        return stops, given["max_gen_toks"], temperature, top_p

    def _prompt(self, tokens: list[int], n_new: int) -> np.ndarray:
        if self._max_length and self._max_length <= n_new:
            raise UserError(
                f"--max_length={self._max_length}: a task generates up to {n_new} tokens; give more, or leave it out"
            )
        return np.array(tokens[-(self._max_length - n_new) :] if self._max_length else tokens, np.int32)
