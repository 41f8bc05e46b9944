"""--mode=sample: text from a model, in constant time and memory a token, whatever the length.

The prompt is read in blocks, largest first; then one token at a time: the same attention with a block of one. All that
the model remembers is its state, whose size is fixed.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tvq_pod import images
from tvq_pod.checkpoint import Checkpoints
from tvq_pod.config import MeshSettings, SampleSettings, Settings, check_vocab_fits
from tvq_pod.data.vocab import END_OF_DOC, PAD, UNKNOWN, ByteVocab, Vocab, kept_vocab, load_vocab
from tvq_pod.draw import draw_token
from tvq_pod.errors import UserError
from tvq_pod.identity import model_record
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.scores import NEVER
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.deadlines import still_working
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.processes import on_first
from tvq_pod.parallel.sharding import on_one_device
from tvq_pod.train_state import abstract_train_state


class Sampler:
    """Draws tokens from a model; compiled functions are kept from prompt to prompt."""

    def __init__(self, config: TransformerConfig, n_vocab: int, temperature: float, nucleus_p: float):
        """n_vocab: ids at or above it are never drawn (a model may have room for more)."""
        self._config = config.replace(is_train=False)
        self._read = jax.jit(self._read_block, donate_argnums=1)
        ids = np.arange(config.n_vocab)
        self._allowed = (ids < n_vocab) & (ids != PAD) & (ids != UNKNOWN)
        draw = functools.partial(draw_token, temperature=temperature, nucleus_p=nucleus_p)

        def step(params, state, logits, key, index):
            logits = jnp.where(self._allowed, logits, NEVER)
            token = draw(logits, jax.random.fold_in(key, index))
            state, logits = self._read_block(params, state, token[None, None])
            return state, logits, token

        self._step = jax.jit(step, donate_argnums=1)

    def _read_block(self, params, state, tokens):
        """Reads tokens [1, n] as one block; returns the state and the logits [n_vocab] after the last of them."""
        config = self._config.replace(block_len=tokens.shape[1])
        state, out = Transformer(config).apply({"params": params}, state, tokens, jnp.zeros_like(tokens))
        return state, out["logits"][0, -1]

    def sample(
        self, params: dict, prompt: np.ndarray, length: int, key: jax.Array, stop_at_end: bool = True
    ) -> Iterator[int]:
        """Yields up to `length` tokens that go on from prompt [n], a document's first tokens; stops before an
        end-of-document, if `stop_at_end`."""
        state = jax.jit(Transformer.initial_state, static_argnums=(0, 1))(self._config, 1)
        tokens = np.concatenate([[END_OF_DOC], prompt]).astype(np.int32)
        for block in cut_prompt(tokens, self._config.block_len):
            state, logits = self._read(params, state, block[None])
        for index in range(length):
            state, logits, token = self._step(params, state, logits, key, index)
            token = int(token)
            if stop_at_end and token == END_OF_DOC:
                return
            yield token


def cut_prompt(tokens: np.ndarray, block_len: int) -> Iterator[np.ndarray]:
    """Cuts tokens [n] into blocks of block_len, and the rest by powers of two: few lengths, so few compilations."""
    at = 0
    while at < len(tokens):
        left = len(tokens) - at
        n = block_len if left >= block_len else 1 << (left.bit_length() - 1)
        yield tokens[at : at + n]
        at += n


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
) -> Iterator[Iterator[str]]:
    """For each prompt, the prompt and what the model makes of it, as an iterator over pieces of text. Raises UserError
    if a prompt must be text, for a SentencePiece model, and is not."""
    sampler = Sampler(config, vocab.n_vocab, settings.temperature, settings.nucleus_p)
    for index, prompt in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(settings.seed), index)
        try:
            prompt_tokens = vocab.encode(prompt)
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt={prompt!r}: is not UTF-8 at byte {error.start}") from None
        tokens = sampler.sample(params, prompt_tokens, settings.length, key)
        yield _chain(prompt.decode("utf-8", errors="replace"), text_of(tokens, vocab))


def _chain(prompt: str, pieces: Iterator[str]) -> Iterator[str]:
    yield prompt
    yield from pieces


def run_vocab(settings: Settings, workdir: epath.Path) -> Vocab:
    """The run's vocabulary: its own copy of the file, if it has one."""
    own = kept_vocab(workdir)
    return own if own.file_name or settings.data.vocab == ByteVocab.name else load_vocab(settings.data.vocab)


def sample(settings: Settings, workdir: epath.Path, prompts: list[bytes], step: int | None) -> None:
    """Continues each prompt (or config.sample.prompt) with a checkpoint of the run in `workdir`, on stdout.

    One device of process 0 does it: a stream's next token waits for the last one, and its state is small.
    """
    images.check_packages(settings)
    checkpoints = Checkpoints(workdir, restore_timeout_seconds=settings.checkpoint.restore_timeout_seconds)
    step = checkpoints.pick(step)
    vocab = run_vocab(settings, workdir)
    checkpoints.check(step, model_record(settings, vocab.name))
    check_vocab_fits(settings, vocab.n_vocab)
    alone = jax.process_count() == 1
    settings = dataclasses.replace(settings, mesh=MeshSettings(slices=1 if alone else settings.mesh.slices))
    mesh = make_mesh(settings.mesh, jax.local_devices()[:1] if alone else None)
    params = checkpoints.restore_params(step, abstract_train_state(settings, mesh).params)
    params = on_one_device(params, mesh)

    def show():
        if images.are_images(settings):
            images.write_samples(settings, workdir, params, step)
            return
        given = [
            prompt for prompt in prompts or [settings.sample.prompt.encode()] for _ in range(settings.sample.count)
        ]
        for index, pieces in enumerate(continuations(params, settings.model, vocab, settings.sample, given)):
            if index:
                print("\n" + "-" * 80)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)

    on_first(show)
    checkpoints.close()
