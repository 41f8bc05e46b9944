"""Sampling: one token at a time is the forward pass in blocks, and only likely tokens are drawn."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import small_config
from tvq_pod.config import SampleSettings
from tvq_pod.data.vocab import END_OF_DOC, ByteVocab
from tvq_pod.draw import draw_token
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.scores import NEVER
from tvq_pod.sample import Sampler, continuations, cut_prompt, text_of

CONFIG = small_config(n_vocab=ByteVocab.n_vocab + 5, block_len=8, mem_len=4, pe_abs=True)
LENGTH = 40


@functools.cache
def params():
    state, tokens = Transformer.initial_state(CONFIG, 1), jnp.zeros([1, 8], jnp.int32)
    return nn.meta.unbox(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), state, tokens, tokens)["params"])


def forward(tokens):
    """Logits [T, n_vocab] of one pass in blocks of 8 over T tokens, padded behind."""
    padded = np.zeros([1, 64], np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(params(), padded))[0, : len(tokens)]


@jax.jit
def _forward(params, tokens):
    state = Transformer.initial_state(CONFIG, 1)
    return Transformer(CONFIG).apply({"params": params}, state, tokens, jnp.zeros_like(tokens))[1]["logits"]


def test_one_token_at_a_time_is_the_forward_pass_in_blocks():
    tokens = np.random.default_rng(0).integers(3, 259, size=LENGTH).astype(np.int32)
    sampler = Sampler(CONFIG, ByteVocab.n_vocab, temperature=1.0, nucleus_p=1.0)
    expected = forward(tokens)
    state = Transformer.initial_state(CONFIG, 1)
    for place, token in enumerate(tokens):
        state, logits = sampler._read(params(), state, token[None, None])
        np.testing.assert_allclose(logits, expected[place], atol=1e-4)


@pytest.mark.parametrize("prompt_len", [0, 1, 7, 8, 13, 29])
def test_greedy_samples_are_the_argmax_of_the_whole_text_so_far(prompt_len):
    prompt = np.random.default_rng(prompt_len).integers(3, 259, size=prompt_len).astype(np.int32)
    sampler = shared_sampler()
    drawn = list(sampler.sample(params(), prompt, 12, jax.random.key(0)))
    text = [END_OF_DOC, *prompt]
    for token in drawn:
        logits = forward(np.array(text))[-1].copy()
        logits[[0, 2]] = logits[ByteVocab.n_vocab :] = -np.inf
        assert token == np.argmax(logits)
        text.append(token)
    assert drawn


@functools.cache
def shared_sampler():
    return Sampler(CONFIG, ByteVocab.n_vocab, temperature=0.0, nucleus_p=1.0)


def test_a_state_does_not_grow():
    sampler = shared_sampler()
    state = Transformer.initial_state(CONFIG, 1)
    shapes = jax.tree.map(jnp.shape, state)
    for _ in range(30):
        state, _ = sampler._read(params(), state, np.array([[5]], np.int32))
    assert jax.tree.map(jnp.shape, state) == shapes
    assert state["unit0"]["aggcache"]["lower"][0].sum() == CONFIG.n_head * (30 - CONFIG.mem_len)


@pytest.mark.parametrize("length", [1, 7, 8, 100, 127])
def test_a_prompt_is_read_in_few_blocks_of_few_lengths(length):
    tokens = np.arange(length)
    blocks = list(cut_prompt(tokens, 8))
    np.testing.assert_array_equal(np.concatenate(blocks), tokens)
    assert {len(block) for block in blocks} <= {8, 4, 2, 1}
    assert len(blocks) <= length // 8 + 3


def test_only_the_nucleus_is_drawn_in_its_proportions():
    probs = np.array([0.05, 0.4, 0.3, 0.2, 0.05])
    draw = jax.jit(jax.vmap(functools.partial(draw_token, temperature=1.0, nucleus_p=0.6), in_axes=(None, 0)))
    drawn = np.asarray(draw(jnp.log(probs), jax.random.split(jax.random.key(0), 20_000)))
    assert set(drawn) == {1, 2}  # 0.4 alone is less than 0.6, with 0.3 it is enough
    np.testing.assert_allclose((drawn == 1).mean(), 0.4 / 0.7, atol=0.02)


def test_temperature_sharpens_and_flattens():
    probs = np.array([0.2, 0.8])
    keys = jax.random.split(jax.random.key(0), 20_000)
    for temperature in (0.5, 2.0):
        draw = jax.jit(
            jax.vmap(functools.partial(draw_token, temperature=temperature, nucleus_p=1.0), in_axes=(None, 0))
        )
        weights = probs ** (1 / temperature)
        np.testing.assert_allclose(np.mean(draw(jnp.log(probs), keys)), weights[1] / weights.sum(), atol=0.02)
    assert draw_token(jnp.log(probs), keys[0], temperature=0.0, nucleus_p=1.0) == 1


def test_the_likeliest_token_is_always_in_the_nucleus():
    logits = jnp.array([NEVER, 0.0, NEVER])
    assert draw_token(logits, jax.random.key(0), temperature=1.0, nucleus_p=1e-6) == 1


def test_samples_are_a_function_of_the_seed_and_the_prompt_starts_them():
    def texts(seed):
        settings = SampleSettings(length=20, seed=seed, nucleus_p=1.0)
        return ["".join(pieces) for pieces in continuations(params(), CONFIG, ByteVocab(), settings, [b"ab", b"ab"])]

    first = texts(0)
    assert texts(0) == first
    assert texts(1) != first
    assert first[0] != first[1]  # two samples, not one twice
    assert all(text.startswith("ab") for text in first)


def test_every_token_is_drawn_anew():
    indifferent = params() | dict(w_out=jnp.zeros_like(params()["w_out"]))
    sampler = Sampler(CONFIG, ByteVocab.n_vocab, temperature=1.0, nucleus_p=1.0)
    drawn = list(sampler.sample(indifferent, np.array([], np.int32), 60, jax.random.key(0)))
    assert len(drawn) > 20  # 1 in 257 ends a document
    assert len(set(drawn)) > len(drawn) * 0.7


def test_text_streams_out_character_by_character():
    tokens = ByteVocab().encode("añb".encode()).tolist()
    pieces = list(text_of(iter(tokens), ByteVocab()))
    assert "".join(pieces) == "añb"
    assert pieces[0] == "a"
