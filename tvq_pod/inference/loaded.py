"""A trained model for use in other programs: what `tvq_pod.load` returns. docs/export.md has an example."""

import dataclasses
import functools
import os
import typing
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from tvq_pod.config.bounds import must_be
from tvq_pod.config.identity import model_record
from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.resolve import resolve
from tvq_pod.config.run_config import read_run_config
from tvq_pod.config.settings import EvalSettings, MeshSettings, SampleSettings, Settings
from tvq_pod.data.open import run_vocab
from tvq_pod.data.vocab import END_OF_DOC, Vocab, decoded
from tvq_pod.errors import UserError
from tvq_pod.inference.batched import BatchedModel
from tvq_pod.inference.sampler import Sampler
from tvq_pod.inference.text import encoded, rows_of, text_sampling
from tvq_pod.nn.model import Transformer
from tvq_pod.parallel.attention import with_tried_attention
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.training.step import abstract_train_state


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """The model of one checkpoint.

    settings: the run's, with a mesh of this process's devices. step: the checkpoint's. model: a flax module; its config
    is a TransformerConfig. params: its parameters, sharded over the devices, so that `model.apply({"params": params},
    state, inputs, doc_ids)` computes logits (see nn/model.py). vocab: turns text into token ids and back (see
    data/vocab.py). mesh: the devices' mesh.
    """

    settings: Settings
    step: int
    model: Transformer
    params: dict
    vocab: Vocab
    mesh: jax.sharding.Mesh

    def score(self, texts: Sequence[str | bytes], *, with_end: bool = False) -> list[np.ndarray]:
        """The log-probability of every token of each text, in nats, float32 [n] for a text of n tokens.

        Each text is a document, and a token is predicted from all tokens before it, however many there are. with_end:
        the end of the document is scored as one more token. Raises UserError for bytes that are not UTF-8 if the
        vocabulary takes only text, and for a single text instead of a list.
        """
        return self.score_tokens([self._tokens(text) for text in _several(texts)], with_end=with_end)

    def score_tokens(self, documents: Sequence[np.ndarray], *, with_end: bool = False) -> list[np.ndarray]:
        """Like `score`, for documents that are token ids, integers [n]. Raises UserError for a number that is not a
        token id."""
        end = np.full([int(with_end)], END_OF_DOC, np.int32)
        targets = [np.concatenate([self._ids(document), end]) for document in documents]
        return [-nats for nats, _ in self._batched.score(targets, with_hits=False)]

    def generate(
        self,
        prompts: Sequence[str | bytes],
        *,
        length: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> list[str]:
        """Continues documents that begin with `prompts`, all side by side; returns the new text of each.

        length: the most tokens of each, which ends earlier if the document does. temperature: 0 takes the likeliest
        token. top_p: draws from the likeliest tokens that together have this probability. top_k, min_p and
        repetition_penalty: see draw.py. The defaults are those of the run's config.sample. Raises what `score` raises,
        and UserError for values that config.sample does not allow.
        """
        tokens = [self._tokens(prompt) for prompt in _several(prompts)]
        drawn = self.generate_tokens(
            tokens,
            length=length,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        return [decoded(row, self.vocab, prompt) for row, prompt in zip(drawn, tokens, strict=True)]

    def generate_tokens(
        self,
        prompts: Sequence[np.ndarray],
        *,
        length: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> list[np.ndarray]:
        """Like `generate`, for prompts that are token ids, integers [n]; returns the new ones, int32 [m] each. Raises
        what `generate` raises, and UserError for a number that is not a token id."""
        given = dict(length=length, temperature=temperature, top_p=top_p, seed=seed)
        given |= dict(top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty)
        how = dataclasses.replace(self.settings.sample, **{n: value for n, value in given.items() if value is not None})
        _check(how)
        rows, sampler = [], self._sampler(len(prompts), how) if prompts else None
        while sampler and len(rows) < len(prompts):
            group = [self._ids(prompt) for prompt in prompts[len(rows) : len(rows) + sampler.batch_size]]
            chunks = sampler.sample(self.params, group, how.seed, how.length, first_row=len(rows))
            rows += [np.fromiter(row, np.int32) for row in rows_of(chunks, len(group))]
        return rows

    def _tokens(self, text: str | bytes) -> np.ndarray:
        return encoded(text.encode() if isinstance(text, str) else text, self.vocab)

    def _ids(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Checks token ids, and returns them as int32 [n]."""
        ids, n_vocab = np.asarray(tokens), self.vocab.n_vocab
        wrong = ids if ids.dtype.kind not in "iu" else ids[(ids < 0) | (ids >= n_vocab)]
        if wrong.size:
            raise UserError(f"tokens={wrong.flat[0]}: is not a token id; must be an integer from 0 to {n_vocab - 1}")
        return ids.astype(np.int32)

    @functools.cached_property
    def _batched(self) -> BatchedModel:
        return BatchedModel(self.settings, self.params, self.vocab, self.mesh, shows_progress=False)

    @functools.cached_property
    def _samplers(self) -> dict:
        """The samplers that were compiled before."""
        return {}

    def _sampler(self, n_rows: int, how: SampleSettings) -> Sampler:
        sampling, devices = text_sampling(self.model.config, self.vocab, how), list(self.mesh.devices.flat)
        key = n_rows, sampling, how.max_rows
        if key not in self._samplers:
            self._samplers[key] = Sampler(self.model.config, sampling, n_rows, devices, how.max_rows)
        return self._samplers[key]


def _several(texts: Sequence[str | bytes]) -> Sequence[str | bytes]:
    """Returns the texts. Raises UserError for a single text, which is also a sequence of texts: its characters."""
    if isinstance(texts, str | bytes):
        raise UserError(f"texts={texts[:40]!r}: is one text; give a list of texts")
    return texts


def _check(how: SampleSettings) -> None:
    """Raises UserError for a value that config.sample does not allow."""
    for name, hint in typing.get_type_hints(SampleSettings, include_extras=True).items():
        if wanted := must_be(hint, value := getattr(how, name)):
            raise UserError(f"{name}={value}: must be {wanted}")


def load_run(workdir: str | os.PathLike[str], step: int | None) -> LoadedModel:
    """See `tvq_pod.load`."""
    settings = resolve(read_run_config(workdir))
    # The run's own machines, and whether its evaluations use the cache, don't matter here.
    evaluation = EvalSettings(weights=settings.eval.weights)
    settings = dataclasses.replace(settings, mesh=MeshSettings(fsdp=settings.mesh.fsdp), eval=evaluation)
    workdir, mesh = epath.Path(workdir), make_mesh(settings.mesh, jax.local_devices())
    settings = with_tried_attention(settings, mesh)
    checkpoints = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
    step, vocab = checkpoints.pick(step), run_vocab(settings, workdir)
    checkpoints.check(step, model_record(settings, vocab.name))
    check_vocab_fits(settings, vocab.n_vocab)
    abstract = abstract_train_state(settings, mesh).params
    params = checkpoints.restore_params(step, abstract, settings.eval.weights)
    checkpoints.close()
    return LoadedModel(settings, step, Transformer(settings.model), params, vocab, mesh)
