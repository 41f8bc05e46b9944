"""Samples text: this module turns prompts into rows, and rows into text. sampler.py draws the tokens."""

import collections
import contextlib
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from tvq_pod.config.settings import SampleSettings, Settings
from tvq_pod.config.stop_strings import stop_strings
from tvq_pod.data.open import run_vocab
from tvq_pod.data.vocab import NOTHING, PAD, UNKNOWN, Vocab, decoder_after
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import OutputError, say
from tvq_pod.inference import images
from tvq_pod.inference.sampler import NO_TOKEN, Sampler, Sampling
from tvq_pod.inference.stop import encodable_stops, until_stop
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.deadlines import still_working


def text_of(tokens: Iterator[int], vocab: Vocab, before: np.ndarray = NOTHING) -> Iterator[str]:
    """Yields the text of tokens that follow the tokens `before`, piece by piece, as soon as each is known."""
    decoder = decoder_after(before, vocab)
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
    devices: list,
) -> Iterator[Iterator[str]]:
    """Yields an iterator over pieces of text for each prompt: the prompt and its continuation. All are sampled side by
    side on `devices`, so they must be read in order. Raises UserError if a prompt is not text but must be, for a
    SentencePiece model; and if the vocabulary can't encode a stop string."""
    tokens = [encoded(prompt, vocab) for prompt in prompts]
    encodable_stops(settings.stop, vocab)
    sampler = Sampler(config, text_sampling(config, vocab, settings), len(prompts), devices, settings.max_rows)
    return _in_groups(sampler, params, prompts, tokens, settings, vocab)


def text_sampling(config: TransformerConfig, vocab: Vocab, settings: SampleSettings) -> Sampling:
    """The sampling parameters for text: any token of the vocabulary except padding and unknown may be drawn."""
    ids = np.arange(config.n_vocab)
    allowed = (ids < vocab.n_vocab) & (ids != PAD) & (ids != UNKNOWN)
    how = (settings.temperature, settings.top_p, settings.top_k, settings.min_p, settings.repetition_penalty)
    return Sampling(tuple(allowed.tolist()), *how)


def _in_groups(sampler, params, prompts, tokens, settings, vocab) -> Iterator[Iterator[str]]:
    for first in range(0, len(prompts), sampler.batch_size):
        group = slice(first, first + sampler.batch_size)
        chunks = sampler.sample(params, tokens[group], settings.seed, settings.length, first_row=first)
        rows = rows_of(chunks, len(prompts[group]))
        for prompt, before, row in zip(prompts[group], tokens[group], rows, strict=True):
            text = until_stop(text_of(row, vocab, before), stop_strings(settings.stop))
            yield itertools.chain([prompt.decode("utf-8", errors="replace")], text)


def rows_of(chunks: Iterator[np.ndarray], n_rows: int) -> list[Iterator[int]]:
    """The tokens of each row, from chunks [n_rows, n] of all rows: tokens that were not read yet are kept for their
    row."""
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


def encoded(prompt: bytes, vocab: Vocab) -> np.ndarray:
    """The token ids of a prompt. Raises UserError if it must be text and is not."""
    try:
        return vocab.encode(prompt)
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt={prompt!r}: is not UTF-8 at byte {error.start}") from None


def keep_sample(settings: Settings, workdir: epath.Path, params: dict, step: int) -> None:
    """Prints a sample of a model whose parameters are on one device, and writes it to WORKDIR/samples; images are only
    written."""
    if images.are_images(settings):
        drawn = images.draw_images(params, settings.model, settings.sample, jax.local_devices())
        images.write_samples(drawn, workdir, step)
        return
    vocab = run_vocab(settings, workdir)
    prompt = settings.sample.prompt.encode()
    devices = jax.local_devices()[:1]
    text = "".join(next(continuations(params, settings.model, vocab, settings.sample, [prompt], devices)))
    path = workdir / "samples" / f"step_{step}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        say(f"a sample, kept in {path}:")
    except OSError as error:
        say(f"WARNING: {path} can't be written ({error.strerror}); the sample:")
    with contextlib.suppress(OutputError):  # nobody reads it, and everything is saved
        print(text, flush=True)
