"""--mode=sample: text from a model. How tokens are drawn is in sampler.py; here prompts become rows, and rows text."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from tvq_pod import images
from tvq_pod.checkpoint import Checkpoints
from tvq_pod.config import MeshSettings, SampleSettings, Settings, check_vocab_fits
from tvq_pod.data.vocab import PAD, UNKNOWN, ByteVocab, Vocab, kept_vocab, load_vocab
from tvq_pod.errors import UserError
from tvq_pod.identity import model_record
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.deadlines import still_working
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.processes import on_first, text_from_first
from tvq_pod.sampler import NO_TOKEN, Sampler, Sampling
from tvq_pod.train_state import abstract_train_state


def text_of(tokens: Iterator[int], vocab: Vocab) -> Iterator[str]:
    """The text of tokens, piece by piece, as soon as each is known."""
    decoder = vocab.decoder()
    for token in tokens:
        still_working()
        yield decoder.decode(token)
    yield decoder.decode(PAD, final=True)


def continuations(
    params: dict,
    config: TransformerConfig,
    vocab: Vocab,
    settings: SampleSettings,
    prompts: list[bytes],
    devices: list[jax.Device],
) -> Iterator[Iterator[str]]:
    """For each prompt, the prompt and what the model makes of it, as an iterator over pieces of text. All are sampled
    side by side on `devices`, so they must be read in order. Raises UserError if a prompt must be text, for a
    SentencePiece model, and is not."""
    tokens = [_encoded(prompt, vocab) for prompt in prompts]
    ids = np.arange(config.n_vocab)
    allowed = (ids < vocab.n_vocab) & (ids != PAD) & (ids != UNKNOWN)
    sampling = Sampling(tuple(allowed.tolist()), settings.temperature, settings.nucleus_p)
    sampler = Sampler(config, sampling, len(prompts), devices)
    return _in_groups(sampler, params, prompts, tokens, settings, vocab)


def _in_groups(sampler, params, prompts, tokens, settings, vocab) -> Iterator[Iterator[str]]:
    for first in range(0, len(prompts), sampler.batch_size):
        group = slice(first, first + sampler.batch_size)
        chunks = sampler.sample(params, tokens[group], settings.seed, settings.length, first_row=first)
        for prompt, row in zip(prompts[group], rows_of(chunks, len(prompts[group])), strict=True):
            yield itertools.chain([prompt.decode("utf-8", errors="replace")], text_of(row, vocab))


def rows_of(chunks: Iterator[np.ndarray], n_rows: int) -> list[Iterator[int]]:
    """The tokens of each row, from chunks [n_rows, n] of all: what a row has not been asked for is kept for it."""
    waiting = [collections.deque() for _ in range(n_rows)]

    def row(own: collections.deque) -> Iterator[int]:
        while True:
            while own:
                yield own.popleft()
            chunk = next(chunks, None)
            if chunk is None:
                return
            for each, drawn in zip(waiting, chunk, strict=True):
                each.extend(drawn[drawn != NO_TOKEN].tolist())

    return [row(own) for own in waiting]


def _encoded(prompt: bytes, vocab: Vocab) -> np.ndarray:
    try:
        return vocab.encode(prompt)
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt={prompt!r}: is not UTF-8 at byte {error.start}") from None


def run_vocab(settings: Settings, workdir: epath.Path) -> Vocab:
    """The run's vocabulary: its own copy of the file, if it has one."""
    own = kept_vocab(workdir)
    return own if own.file_name or settings.data.vocab == ByteVocab.name else load_vocab(settings.data.vocab)


def sample(settings: Settings, workdir: epath.Path, prompts: list[bytes], step: int | None) -> None:
    """Continues each prompt (or config.sample.prompt) with a checkpoint of the run in `workdir`, on stdout,
    config.sample.count times; for a model of images, draws so many.

    Rows are spread over all devices, of all processes; process 0's prompts are taken. One process shows the first row's
    text as it comes, several when all rows have ended.
    """
    images.check_packages(settings)
    checkpoints = Checkpoints(workdir, restore_timeout_seconds=settings.checkpoint.restore_timeout_seconds)
    step = checkpoints.pick(step)
    vocab = run_vocab(settings, workdir)
    checkpoints.check(step, model_record(settings, vocab.name))
    check_vocab_fits(settings, vocab.n_vocab)
    alone, count = jax.process_count() == 1, settings.sample.count
    prompts = _from_first(prompts or [settings.sample.prompt.encode()])
    given = [prompt for prompt in prompts for _ in range(count)]
    n_rows = count if images.are_images(settings) else len(given)
    settings = dataclasses.replace(settings, mesh=MeshSettings(slices=1 if alone else settings.mesh.slices))
    mesh = make_mesh(settings.mesh, jax.local_devices()[:n_rows] if alone else None)
    params = checkpoints.restore_params(step, abstract_train_state(settings, mesh).params)
    devices = list(mesh.devices.flat)
    if images.are_images(settings):
        drawn = images.draw_images(params, settings.model, settings.sample, devices)
        on_first(lambda: images.write_samples(drawn, workdir, step))
    else:
        texts = continuations(params, settings.model, vocab, settings.sample, given, devices)
        if not alone:
            texts = [list(pieces) for pieces in texts]
        on_first(lambda: _show(texts))
    checkpoints.close()


def _from_first(prompts: list[bytes]) -> list[bytes]:
    """Process 0's: a prompt's file may differ from host to host."""
    texts = json.loads(text_from_first(json.dumps([prompt.decode("latin-1") for prompt in prompts])))
    return [text.encode("latin-1") for text in texts]


def _show(texts) -> None:
    for index, pieces in enumerate(texts):
        if index:
            print("\n" + "-" * 80)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
