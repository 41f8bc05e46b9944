"""Rows that are filled again: what each yields is its own, bit for bit, whatever stands beside it and whenever it
begins."""

import functools

import jax
import numpy as np
import pytest

from tests.common import model_params
from tests.inference.test_sampler import ALLOWED, CONFIG, forward, prompt_of, sampled, sampler_of
from tvq_pod.data.vocab import END_OF_DOC
from tvq_pod.inference import continuous
from tvq_pod.inference.continuous import ContinuousSampler, Request
from tvq_pod.inference.sampler import Sampler, Sampling

LENGTHS = (0, 29, 7, 1, 21, 8, 13)  # of prompts: before, at and after the borders of blocks


@functools.cache
def compiled(n_rows, n_devices=1, **how):
    """Rows for more prompts than fit: n_rows of each device."""
    sampling = Sampling(ALLOWED, **dict(top_p=0.9) | how)
    return ContinuousSampler(CONFIG, sampling, 100, jax.devices()[:n_devices], max_rows=n_rows)


def continued(sampler, requests, seed=0):
    """By the number of the request."""
    found = list(sampler.sample_each(model_params(CONFIG), requests, seed))
    assert len(found) == len(requests)
    return {each.request.number: each for each in found}


def requests_of(numbers, length=12, **how):
    """Of other lengths, so that rows end at different times."""
    return [Request(prompt_of(LENGTHS[n]), n, length + 5 * (n % 3), **how) for n in numbers]


def bits_of(found):
    return found.tokens.tolist(), found.logprobs.tobytes(), found.ended_by


@pytest.mark.slow(3)
def test_what_a_row_yields_does_not_depend_on_the_rows_beside_it_or_on_when_it_begins():
    """Down to the last bit of the log-probabilities."""
    sampler = compiled(2, logprobs=True)
    assert sampler.batch_size == 2
    together = continued(sampler, requests_of(range(7)))
    assert len({len(found.tokens) for found in together.values()}) > 1
    for numbers in ([6, 5, 4, 3, 2, 1, 0], [3], [4, 2]):
        for number, found in continued(sampler, requests_of(numbers)).items():
            assert bits_of(found) == bits_of(together[number])


@pytest.mark.slow
def test_many_prompts_yield_what_one_at_a_time_yields():
    """Against the sampler of rows that begin together, with one row; on one device and on eight."""
    expected = [
        sampled(sampler_of(1), [prompt_of(LENGTHS[n])], length=12 + 5 * (n % 3), first_row=n)[0] for n in range(7)
    ]
    for sampler in (compiled(2, logprobs=True), compiled(1, n_devices=8, logprobs=True)):
        found = continued(sampler, requests_of(range(7)))
        assert [found[n].tokens.tolist() for n in range(7)] == expected
    few = continued(compiled(1, n_devices=8, logprobs=True), requests_of([4, 2]))
    assert {n: each.tokens.tolist() for n, each in few.items()} == {4: expected[4], 2: expected[2]}


def penalized_greedily(prompt, n, penalty):
    """Tokens and log-probabilities: from the model's logits of the whole text so far, token by token."""
    tokens, logprobs = [END_OF_DOC, *prompt], []
    for _ in range(n):
        logits = forward(np.array(tokens))[-1].astype(np.float64)
        changed = logits.copy()
        for token in set(tokens[1:]):
            changed[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        changed[~np.array(ALLOWED)] = -np.inf
        tokens.append(int(np.argmax(changed)))
        logprobs.append(logits[tokens[-1]] - np.log(np.sum(np.exp(logits))))
        if tokens[-1] == END_OF_DOC:
            return tokens[1 + len(prompt) : -1], logprobs[:-1]
    return tokens[1 + len(prompt) :], logprobs


@pytest.mark.slow(2)
@pytest.mark.parametrize("short_block", [4, 8, 16])
def test_penalties_and_log_probabilities_are_those_of_the_whole_text_so_far(monkeypatch, short_block):
    """Of rows that follow each other in one place, which forgets what the last one has seen. Each token of a prompt is
    read once, whether short blocks are shorter than blocks, as long, or longer."""
    monkeypatch.setattr(continuous, "SHORT_BLOCK", short_block)
    sampler = compiled(1, temperature=0.0, repetition_penalty=3.0, logprobs=True)
    found = continued(sampler, [Request(prompt_of(length), length, 20) for length in (29, 3, 13)])
    for length in (29, 3, 13):
        tokens, logprobs = penalized_greedily(prompt_of(length), 20, 3.0)
        assert found[length].tokens.tolist() == tokens
        assert len(set(tokens)) > 15  # as few are drawn twice
        np.testing.assert_allclose(found[length].logprobs, logprobs, atol=1e-4)


@pytest.mark.slow
def test_the_sampler_of_rows_that_begin_together_has_the_same_penalty():
    how = dict(temperature=0.0, top_p=0.9, repetition_penalty=3.0)
    together = Sampler(CONFIG, Sampling(ALLOWED, **how), 3, jax.devices()[:1])
    prompts = [prompt_of(length) for length in (29, 3, 13)]
    expected = [penalized_greedily(prompt, 15, 3.0)[0] for prompt in prompts]
    assert sampled(together, prompts, length=15) == expected


@pytest.mark.slow(2)
def test_a_row_ends_where_it_is_told_to_and_gives_its_place_away():
    sampler, told = compiled(2, logprobs=True), []

    def is_last(token):
        told.append(token)
        return len(told) == 3

    free = continued(sampler, requests_of(range(7)))
    ended = {n: free[n].ended_by for n in free}
    requests = [Request(prompt_of(LENGTHS[0]), 0, 0), Request(prompt_of(LENGTHS[1]), 1, 30, is_last)]
    found = continued(sampler, requests + requests_of(range(2, 7)))
    assert (found[0].tokens.tolist(), found[0].ended_by) == ([], "length")
    assert (found[1].tokens.tolist(), found[1].ended_by) == (told, "stop")
    assert told == free[1].tokens.tolist()[:3]
    assert found[1].logprobs.tolist() == free[1].logprobs.tolist()[:3]
    assert {n: found[n].ended_by for n in range(2, 7)} == {n: ended[n] for n in range(2, 7)}


def test_without_prompts_there_is_nothing():
    assert list(compiled(2, logprobs=True).sample_each(model_params(CONFIG), [], 0)) == []
