"""Sampling: one token at a time is the forward pass in blocks, rows do not depend on each other, and only likely tokens
are drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import model_params, small_config
from tvq_pod.config.settings import SampleSettings
from tvq_pod.data.vocab import END_OF_DOC, PAD, UNKNOWN, ByteVocab
from tvq_pod.inference import sampler, text
from tvq_pod.inference.draw import draw_tokens
from tvq_pod.inference.sampler import NO_TOKEN, Sampler, Sampling
from tvq_pod.inference.text import continuations, rows_of, text_of
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.scores import NEVER

CONFIG = small_config(n_vocab=ByteVocab.n_vocab + 5, block_len=8, mem_len=4, pe_abs=True, n_layer=1)
LENGTH = 40


def forward(tokens):
    """Logits [T, n_vocab] of one pass in blocks of 8 over T tokens, padded behind."""
    padded = np.zeros([1, 64], np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(model_params(CONFIG), padded))[0, : len(tokens)]


@jax.jit
def _forward(params, tokens):
    state = Transformer.initial_state(CONFIG, 1)
    return Transformer(CONFIG).apply({"params": params}, state, tokens, jnp.zeros_like(tokens))[1]["logits"]


ALLOWED = tuple(n not in (PAD, UNKNOWN) and n < ByteVocab.n_vocab for n in range(CONFIG.n_vocab))


@functools.cache
def compiled_sampler(config, sampling, n_rows, devices):
    return Sampler(config, sampling, n_rows, list(devices))


def sampler_of(n_rows, n_devices=1, temperature=1.0):
    return compiled_sampler(CONFIG, Sampling(ALLOWED, temperature, 0.9), n_rows, tuple(jax.devices()[:n_devices]))


def sampled(a_sampler, prompts, seed=0, length=12, **how):
    """The tokens of each row, a list of lists."""
    chunks = a_sampler.sample(model_params(CONFIG), prompts, seed, length, **how)
    return [list(row) for row in rows_of(chunks, len(prompts))]


def prompt_of(length, seed=None):
    rng = np.random.default_rng(length if seed is None else seed)
    return rng.integers(3, 259, size=length).astype(np.int32)


@pytest.mark.slow
def test_greedy_samples_are_the_argmax_of_the_whole_text_so_far():
    """Prompts that end before, at and after the borders of blocks, in one batch."""
    prompts = [prompt_of(length) for length in (0, 1, 7, 8, 13, 29)]
    for prompt, drawn in zip(prompts, sampled(sampler_of(6, temperature=0.0), prompts), strict=True):
        assert drawn
        logits = forward(np.array([END_OF_DOC, *prompt, *drawn]))[len(prompt) : -1].copy()
        logits[:, ~np.array(ALLOWED)] = -np.inf
        np.testing.assert_array_equal(drawn, logits.argmax(axis=-1))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 2**31 - 1), st.integers(0, 100))
def test_a_row_yields_what_it_yields_alone(lengths, seed, first_row):
    prompts = [prompt_of(length) for length in lengths]
    together = sampled(sampler_of(6), prompts, seed, first_row=first_row)
    spread = sampled(sampler_of(8, n_devices=8), prompts, seed, first_row=first_row)
    alone = [sampled(sampler_of(1), [prompt], seed, first_row=first_row + n)[0] for n, prompt in enumerate(prompts)]
    assert together == alone
    assert spread == alone


def test_rows_are_spread_over_the_devices_and_go_in_groups_when_there_are_many(eight_devices, monkeypatch):
    assert sampler_of(3, n_devices=8).batch_size == 3  # no device without a row
    assert sampler_of(9, n_devices=8).batch_size == 16
    monkeypatch.setattr(sampler, "MAX_ROWS", 2)
    few = Sampler(CONFIG, Sampling(ALLOWED), 100, eight_devices)
    assert few.batch_size == 16
    monkeypatch.setattr(sampler, "STATE_BYTES", 1)
    assert Sampler(CONFIG, Sampling(ALLOWED), 100, eight_devices).batch_size == 8
    state = few._start(few._begin())
    assert len(state["units"][0]["mean"].addressable_shards) == 8
    assert state["units"][0]["mean"].addressable_shards[0].data.shape[0] == 2


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_how_often_the_loop_returns(monkeypatch):
    prompts = [prompt_of(3), prompt_of(20)]
    expected = sampled(sampler_of(6), prompts, length=70, stop_at_end=False)
    assert [len(row) for row in expected] == [70, 70]
    monkeypatch.setattr(sampler, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(sampler, "FEWEST", 1)  # one token at a time
    chunks = list(sampler_of(6).sample(model_params(CONFIG), prompts, 0, 70, stop_at_end=False))
    assert len(chunks) > 50
    assert [row[row != NO_TOKEN].tolist() for row in np.concatenate(chunks, axis=1)] == expected


def indifferent():
    """A model to which all tokens are alike."""
    return model_params(CONFIG) | dict(w_out=jnp.zeros_like(model_params(CONFIG)["w_out"]))


@pytest.mark.slow(2)
def test_an_end_of_document_ends_its_row_alone():
    chunks = list(sampler_of(6).sample(indifferent(), [prompt_of(3)] * 6, 0, 400))
    lengths = [int(np.sum(row != NO_TOKEN)) for row in np.concatenate(chunks, axis=1)]
    assert len(set(lengths)) > 3  # 1 in 257 ends a document
    assert min(lengths) < 400
    assert not any((chunk == END_OF_DOC).any() for chunk in chunks)


@pytest.mark.slow
def test_the_loop_ends_with_its_last_row(monkeypatch):
    only_end = Sampling(tuple(n == END_OF_DOC for n in range(CONFIG.n_vocab)), temperature=0.0)
    a_sampler, states = Sampler(CONFIG, only_end, 1, jax.devices()[:1]), []
    draw = a_sampler._draw
    monkeypatch.setattr(a_sampler, "_draw", lambda *args: states.append(draw(*args)) or states[-1])
    (chunk,) = a_sampler.sample(model_params(CONFIG), [prompt_of(3)], 0, 1000)
    assert (chunk == NO_TOKEN).all()
    ((state, *_),) = states
    assert state["position"] == 4  # the document's start and the prompt; nothing after that was read


def test_only_the_nucleus_is_drawn_in_its_proportions():
    probs = np.array([0.05, 0.4, 0.3, 0.2, 0.05])
    drawn = draw_many(jnp.log(probs), temperature=1.0, top_p=0.6)
    assert set(drawn) == {1, 2}  # 0.4 alone is less than 0.6, with 0.3 it is enough
    np.testing.assert_allclose((drawn == 1).mean(), 0.4 / 0.7, atol=0.02)


def draw_many(logits, n=20_000, **how):
    uniforms = np.random.default_rng(0).random(n, np.float32)
    return np.asarray(draw_compiled(np.broadcast_to(logits, (n, len(logits))), uniforms, **how))


draw_compiled = jax.jit(draw_tokens, static_argnames=("temperature", "top_p"))


@pytest.mark.slow(2)
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32) | st.just(NEVER), min_size=1, max_size=40),
    st.sampled_from([(0.01, 1.0), (0.5, 2.0), (0.95, 0.3), (0.999, 1.0)]),
)
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_are_enough(logits, how):
    """Against a sort in float64. Tokens as likely as the least likely of the nucleus belong to it."""
    top_p, temperature = how
    logits = np.array(logits + [NEVER] * (40 - len(logits)), np.float32)  # one length, compiled once
    drawn = set(draw_many(logits, 1000, temperature=temperature, top_p=top_p).tolist())
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    ordered = np.sort(weights)[::-1]
    sums = np.cumsum(ordered) / ordered.sum()
    n_kept = int(np.sum(sums < top_p - 1e-5)) + 1
    most = int(np.sum(sums < top_p + 1e-5)) + 1
    least = ordered[min(most, len(ordered)) - 1] * (1 - 1e-5)
    assert drawn <= set(np.flatnonzero(weights >= least).tolist())
    if ordered[0] / ordered.sum() > 0.2:
        assert int(np.argmax(logits)) in drawn or (logits == logits.max()).sum() > 1
    assert len(drawn) <= max(n_kept, most) or len(set(ordered.tolist())) < len(ordered)


def test_temperature_sharpens_and_flattens():
    probs = np.array([0.2, 0.8])
    for temperature in (0.5, 2.0):
        weights = probs ** (1 / temperature)
        drawn = draw_many(jnp.log(probs), temperature=temperature, top_p=1.0)
        np.testing.assert_allclose(np.mean(drawn), weights[1] / weights.sum(), atol=0.02)
    assert (draw_many(jnp.log(probs), 100, temperature=0.0, top_p=1.0) == 1).all()


def test_the_likeliest_token_is_always_in_the_nucleus():
    logits = jnp.array([NEVER, 0.0, NEVER])
    assert (draw_many(logits, 100, temperature=1.0, top_p=1e-6) == 1).all()


def test_what_can_not_be_is_not_drawn_at_the_ends_of_the_interval():
    logits = jnp.array([[NEVER, 0.0, 0.0, NEVER]] * 2)
    uniforms = jnp.array([0.0, 1.0 - 2.0**-24])
    np.testing.assert_array_equal(draw_tokens(logits, uniforms, temperature=1.0, top_p=1.0), [1, 2])


def test_samples_are_a_function_of_the_seed_and_the_prompt_starts_them(monkeypatch):
    monkeypatch.setattr(text, "Sampler", lambda *args: compiled_sampler(*args[:3], tuple(args[3])))

    def texts(seed):
        how, prompts = SampleSettings(length=12, seed=seed, top_p=0.9), [b"ab"] * 6
        found = continuations(model_params(CONFIG), CONFIG, ByteVocab(), how, prompts, jax.devices()[:1])
        return ["".join(pieces) for pieces in found]

    first = texts(0)
    assert texts(0) == first
    assert texts(1) != first
    assert first[0] != first[1]  # two samples, not one twice
    assert all(sample.startswith("ab") for sample in first)


def test_every_token_is_drawn_anew():
    chunks = list(sampler_of(6).sample(indifferent(), [prompt_of(0)], 0, 60, stop_at_end=False))
    (drawn,) = np.concatenate(chunks, axis=1)
    drawn = drawn[drawn != NO_TOKEN]
    assert len(drawn) == 60
    assert len(set(drawn.tolist())) > 40


def test_the_first_row_streams_while_others_wait():
    """A row is asked for no more chunks than it needs, and what others drew meanwhile is kept."""
    asked = []

    def chunks():
        for n in range(3):
            asked.append(n)
            yield np.array([[n, NO_TOKEN], [10 + n, 20 + n]])

    first, second = rows_of(chunks(), 2)
    assert next(first) == 0
    assert asked == [0]
    assert list(first) == [1, 2]
    assert list(second) == [10, 20, 11, 21, 12, 22]
    assert asked == [0, 1, 2]


def test_text_streams_out_character_by_character():
    tokens = ByteVocab().encode("añb".encode()).tolist()
    pieces = list(text_of(iter(tokens), ByteVocab()))
    assert "".join(pieces) == "añb"
    assert pieces[0] == "a"
