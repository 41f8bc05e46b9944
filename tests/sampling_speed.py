"""How fast tokens are sampled. Not a test: `python -m tests.sampling_speed` prints tables of tokens per second.

The model is that of docs/bench.md, with random weights. What is compared takes turns in one process.
"""

import argparse
import time

import jax
import numpy as np

from tests.common import model_params
from tvq_pod.config.model import TransformerConfig
from tvq_pod.inference.continuous import ContinuousSampler, Request
from tvq_pod.inference.sampler import Sampler, Sampling

CONFIG = TransformerConfig(
    d_model=256, d_k=64, d_v=512, n_layer=2, n_code=256, block_len=256, mem_len=256, n_vocab=259, is_train=False
)
SAMPLING = Sampling((True,) * CONFIG.n_vocab, top_p=0.95)
LENGTHS = {1: 512, 16: 128, 256: 32}  # rows: tokens of each
NO_PROMPT = np.zeros([0], np.int32)


def sampler_of(kind: type[Sampler], n_rows: int) -> Sampler:
    return kind(CONFIG, SAMPLING, n_rows, jax.devices()[:1], max_rows=256)


def together(sampler: Sampler, params: dict, lengths: list[int]) -> None:
    """Rows that begin together; each group waits for its longest, as a batch without continuous filling does."""
    for first in range(0, len(lengths), sampler.batch_size):
        group = lengths[first : first + sampler.batch_size]
        for _ in sampler.sample(params, [NO_PROMPT] * len(group), 0, max(group), stop_at_end=False):
            pass


def continuous(sampler: ContinuousSampler, params: dict, lengths: list[int]) -> None:
    """Rows that are filled again."""
    requests = [Request(NO_PROMPT, number, length) for number, length in enumerate(lengths)]
    for _ in sampler.sample_each(params, requests, 0, stop_at_end=False):
        pass


def take_turns(params: dict, n_turns: int) -> None:
    """Tokens per second of all rows: medians of turns, lowest and highest; and per second of CPU time, which other
    programs on the machine change less."""
    rng = np.random.default_rng(0)
    cases = {f"{rows} row(s) of {length} tokens": (rows, [length] * rows) for rows, length in LENGTHS.items()}
    cases["64 prompts of 8 to 248 tokens in 16 rows"] = 16, rng.integers(8, 249, 64).tolist()
    runs = {}
    for name, (rows, lengths) in cases.items():
        for kind, run in ((Sampler, together), (ContinuousSampler, continuous)):
            runs[name, run.__name__] = run, sampler_of(kind, rows), lengths
    speeds = {key: [] for key in runs}
    for turn in range(n_turns + 1):
        for key, (run, sampler, lengths) in runs.items():
            began = np.array([time.monotonic(), time.process_time()])
            run(sampler, params, lengths)
            if turn:  # the first compiles
                speeds[key].append(sum(lengths) / (np.array([time.monotonic(), time.process_time()]) - began))
    print(f"tokens per second, median of {n_turns} turns (lowest to highest); per second of CPU time")
    for (name, kind), values in speeds.items():
        by_clock, by_cpu = np.transpose(values)
        line = f"{np.median(by_clock):6,.0f} ({min(by_clock):,.0f} to {max(by_clock):,.0f}); {np.median(by_cpu):6,.0f}"
        print(f"{name:>42}, {kind:>10}: {line}")


def go_far(params: dict, n_rows: int, n_tokens: int, stretch: int) -> None:
    """Tokens per second of each stretch of a long sample."""
    times = []

    def is_last(token: int) -> bool:
        times.append(time.monotonic())
        return False

    requests = [Request(NO_PROMPT, 0, n_tokens, is_last)]
    requests += [Request(NO_PROMPT, number, n_tokens) for number in range(1, n_rows)]
    sampler = sampler_of(ContinuousSampler, n_rows)
    assert isinstance(sampler, ContinuousSampler)
    for _ in sampler.sample_each(params, requests, 0, stop_at_end=False):
        pass
    print(f"{n_rows} row(s), tokens per second of all rows, by stretches of {stretch} tokens of each")
    for end in range(2 * stretch, n_tokens + 1, stretch):  # the first has what is compiled
        print(f"{end - stretch:>8} to {end:>8}: {n_rows * stretch / (times[end - 1] - times[end - stretch - 1]):8,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="of the long sample")
    parser.add_argument("--tokens", type=int, default=16384, help="of each row of the long sample; 0: none")
    given = parser.parse_args()
    params = model_params(CONFIG)
    if given.turns:
        take_turns(params, given.turns)
    if given.tokens:
        go_far(params, given.rows, given.tokens, given.tokens // 8)


if __name__ == "__main__":
    main()
