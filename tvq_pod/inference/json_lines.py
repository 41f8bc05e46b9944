"""Samples as JSON lines, for many prompts: each line is written as soon as all lines before it are known."""

import dataclasses
import json
from collections.abc import Iterator, Sequence

import numpy as np

from tvq_pod.config.settings import SampleSettings
from tvq_pod.data.vocab import Vocab
from tvq_pod.inference.continuous import Continuation, ContinuousSampler, Request
from tvq_pod.inference.prompts import Prompt
from tvq_pod.inference.stop import StopText, encodable_stops
from tvq_pod.inference.text import encoded, text_sampling
from tvq_pod.nn.types import TransformerConfig


def sampled_lines(
    params: dict,
    config: TransformerConfig,
    vocab: Vocab,
    settings: SampleSettings,
    prompts: Sequence[Prompt],
    devices: list,
) -> Iterator[str]:
    """Continues each prompt `settings.count` times; yields a JSON object for each sample, in the order of the prompts.
    All processes of a job must call it with the same arguments.

    It has `index`, the prompt's index, and `sample`, which counts from 0; the fields of the prompt; `text` and
    `tokens`, the sample without and with the stop string that ended it; `ended_by`; and with settings.logprobs,
    `logprobs` of the tokens, in nats. Raises UserError, before anything is compiled, if a prompt must be text and is
    not, or if the vocabulary can't encode a stop string.
    """
    stops = encodable_stops(settings.stop, vocab)
    tokens, requests, texts = [encoded(prompt.text, vocab) for prompt in prompts], [], []
    for number in range(len(prompts) * settings.count):
        own = tokens[number // settings.count]
        texts.append(StopText(vocab, stops, own))
        requests.append(Request(own, number, settings.length, texts[-1].add))
    sampling = dataclasses.replace(text_sampling(config, vocab, settings), logprobs=settings.logprobs)
    sampler = ContinuousSampler(config, sampling, len(requests), devices, settings.max_rows)

    def lines() -> Iterator[str]:
        ended, n_told = {}, 0
        for found in sampler.sample_each(params, requests, settings.seed):
            ended[found.request.number] = found
            while n_told in ended:
                index, sample = divmod(n_told, settings.count)
                own = dict(index=index, sample=sample) | prompts[index].fields
                yield json.dumps(own | _result(ended.pop(n_told), texts[n_told].text(), settings.logprobs))
                n_told += 1

    return lines()


def _result(found: Continuation, text: str, logprobs: bool) -> dict:
    result = dict(text=text, tokens=found.tokens.tolist(), ended_by=found.ended_by)
    if logprobs:
        result["logprobs"] = np.round(found.logprobs.astype(float), 6).tolist()
    return result
