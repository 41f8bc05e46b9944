"""Measures how long a config's steps take on the devices of this machine.

Timings of shared machines drift. So the variants to compare take turns in one process, and the results are medians over
the turns.
"""

import functools
import statistics
import time

import jax
import numpy as np

from tvq_pod.config.settings import Settings
from tvq_pod.inference.evaluator import make_eval_state, make_eval_step
from tvq_pod.inference.sampler import Sampler, Sampling
from tvq_pod.parallel.sharding import batch_sharding
from tvq_pod.planning.flops import train_flops
from tvq_pod.training.step import TrainStep, create_train_state, make_train_step

SAMPLED = {1: 256, 64: 32}  # rows side by side: tokens of each row in a turn


def measure(variants: list[Settings], mesh: jax.sharding.Mesh, rounds: int) -> list[dict]:
    """Measures variants, which take turns, and returns one row for each. One that does not fit into the devices' memory
    has an `error` instead of figures."""
    runs = [Run(settings, mesh) for settings in variants]
    errors = [run.attempt(run.warm_up) for run in runs]
    for _ in range(rounds):
        errors = [error or run.attempt(run.turn) for run, error in zip(runs, errors, strict=True)]
    return [run.failed(error) if error else run.result() for run, error in zip(runs, errors, strict=True)]


class Run:
    """One config, compiled, and the times of its turns."""

    def __init__(self, settings: Settings, mesh: jax.sharding.Mesh):
        self._settings, self._mesh = settings, mesh
        names = ("train_step", "eval_step", *map(_sampling, SAMPLED))
        self._seconds: dict[str, list[float]] = {name: [] for name in names}

    def warm_up(self) -> None:
        """Compiles everything and runs it once."""
        settings, rows = self._settings, self._settings.train.batch_size
        shape = (rows, settings.train.update_len)
        tokens = np.random.default_rng(0).integers(3, settings.model.n_vocab, size=shape).astype(np.int32)
        batch = dict(
            inputs=tokens, targets=tokens, doc_ids=np.zeros(shape, np.int32), loss_mask=np.ones(shape, np.float32)
        )
        self._batch = jax.device_put(batch, batch_sharding(self._mesh))
        self._state = create_train_state(settings, self._mesh)
        began = time.monotonic()
        program = make_train_step(settings, self._mesh).lower(self._state, self._batch).compile()
        self._train_step, self._memory = TrainStep(program), program.memory_analysis()
        self._compile_seconds = time.monotonic() - began
        self._eval_step = make_eval_step(settings, self._mesh, rows)
        self._eval_state = make_eval_state(settings, self._mesh, rows)
        sampling = Sampling((True,) * settings.model.n_vocab, top_p=0.95)
        devices = list(self._mesh.devices.flat)
        self._samplers = {rows: Sampler(settings.model, sampling, rows, devices) for rows in SAMPLED}
        self.turn()
        self._seconds = {name: [] for name in self._seconds}

    def turn(self) -> None:
        """Runs one train step and one eval step, and samples a few tokens with one row and with many."""
        self._time("train_step", self._train)
        self._time("eval_step", self._evaluate)
        for rows in SAMPLED:
            self._time(_sampling(rows), functools.partial(self._sample, rows))

    def attempt(self, function) -> str | None:
        """Calls warm_up or turn; if there is not enough memory, frees everything and returns the device's message."""
        try:
            function()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = " ".join(str(error).split())[:400]
        else:
            return None
        self._state = self._eval_state = self._batch = None
        return said

    def failed(self, error: str) -> dict:
        """The row of a variant that did not fit."""
        return dict(attn_type=self._settings.model.attn_type, update_len=self._settings.train.update_len, error=error)

    def _time(self, name: str, function) -> None:
        began = time.monotonic()
        jax.block_until_ready(function())
        self._seconds[name].append(time.monotonic() - began)

    def _train(self):
        assert self._state is not None, "warm_up made it"
        assert self._batch is not None, "warm_up made it"
        self._state, metrics = self._train_step(self._state, self._batch)
        return self._state, metrics

    def _evaluate(self):
        assert self._state is not None, "warm_up made it"
        self._eval_state, sums = self._eval_step(self._state.params, self._eval_state, self._batch)
        return self._eval_state, sums

    def _sample(self, rows: int):
        assert self._state is not None, "warm_up made it"
        sampler, prompts = self._samplers[rows], [np.zeros([0], np.int32)] * rows
        for first in range(0, rows, sampler.batch_size):
            group = prompts[first : first + sampler.batch_size]
            for _ in sampler.sample(self._state.params, group, 0, SAMPLED[rows], first_row=first, stop_at_end=False):
                pass

    def result(self) -> dict:
        """The measurements; times in seconds, memory in bytes of one device."""
        train = self._settings.train
        tokens = train.batch_size * train.update_len
        summary = {
            f"{name}_seconds": dict(median=statistics.median(times), min=min(times), max=max(times))
            for name, times in self._seconds.items()
        }
        seconds = summary["train_step_seconds"]["median"]
        memory = self._memory
        assert memory is not None, "XLA knows the memory of its programs"
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        stats = jax.local_devices()[0].memory_stats() or {}
        return dict(
            attn_type=self._settings.model.attn_type,
            update_len=train.update_len,
            compile_seconds=self._compile_seconds,
            **summary,
            train_tokens_per_second=tokens / seconds,
            eval_tokens_per_second=tokens / summary["eval_step_seconds"]["median"],
            sampled_tokens_per_second={
                rows: rows * n / summary[f"{_sampling(rows)}_seconds"]["median"] for rows, n in SAMPLED.items()
            },
            train_flops_per_second=train_flops(self._settings.model, tokens, train.update_len) / seconds,
            peak_bytes=held + memory.temp_size_in_bytes,  # of the compiled train step
            device_peak_bytes=stats.get("peak_bytes_in_use"),  # of the entire process, if the device counts it
        )


def _sampling(rows: int) -> str:
    return f"sampling_{rows}"
