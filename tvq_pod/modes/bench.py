"""--mode=bench: what a config's steps take on the devices that are there, measured; and against quadratic attention.

Timings of shared machines drift. So what is compared takes turns in one process, and medians of the turns are given.
"""

import dataclasses
import functools
import importlib.util
import io
import json
import statistics
import time

import jax
import numpy as np
from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.files import Unwritten, write_whole
from tvq_pod.host.terminal import say
from tvq_pod.inference.evaluator import make_eval_state, make_eval_step
from tvq_pod.inference.sampler import Sampler, Sampling
from tvq_pod.parallel.mesh import check_rows, make_mesh
from tvq_pod.parallel.sharding import batch_sharding
from tvq_pod.planning.flops import train_flops
from tvq_pod.training.step import create_train_state, make_train_step

SAMPLED = {1: 256, 64: 32}  # rows side by side: tokens of each in a turn


def bench(settings: Settings, workdir: epath.Path, against: str | None, lengths: list[int], rounds: int) -> dict:
    """Measures train step, eval step and sampling for each update length; writes bench.json and, for more than one
    length, bench.png into `workdir`; prints a table and returns what is in bench.json.

    against: another attn_type, measured in turns with the config's. lengths: of the update; [] takes the config's.
    """
    lengths = lengths or [settings.train.update_len]
    kinds = [settings.model.attn_type] + ([against] if against and against != settings.model.attn_type else [])
    for length in lengths:
        if length % settings.model.block_len:
            raise UserError(
                f"--lengths={length}: must be a multiple of config.model.block_len={settings.model.block_len}"
            )
    if len(lengths) > 1 and not importlib.util.find_spec("matplotlib"):
        raise UserError(f"--lengths={','.join(map(str, lengths))}: the picture needs pip install -e '.[bench]'")
    mesh = make_mesh(settings.mesh)
    check_rows(settings, mesh)
    unwritten = Unwritten()
    result = dict(
        device=jax.devices()[0].device_kind,
        devices=mesh.size,
        jax=jax.__version__,
        rounds=rounds,
        batch_size=settings.train.batch_size,
        model={name: value for name, value in dataclasses.asdict(settings.model).items() if name != "attn_type"},
        rows=[],
        ratios={},
    )
    for length in lengths:
        rows = measure([with_sizes(settings, kind, length) for kind in kinds], mesh, rounds)
        result["rows"] += rows
        for row in rows:
            say(_line(row))
        if len(rows) == 2 and not any("error" in row for row in rows):
            ours, other = (row["train_step_seconds"]["median"] for row in rows)
            result["ratios"][length] = other / ours
        with unwritten.unless(workdir / "bench.json"):
            workdir.mkdir(parents=True, exist_ok=True)
            write_whole(workdir / "bench.json", json.dumps(result, indent=2) + "\n")  # what is measured is not lost
        if len(lengths) > 1:
            with unwritten.unless(workdir / "bench.png"):
                draw(result, workdir / "bench.png")
    for length, ratio in result["ratios"].items():
        say(f"T = {length}: {kinds[1]} takes {ratio:.2f} times as long as {kinds[0]}")
    unwritten.tell()
    return result


def measure(variants: list[Settings], mesh: jax.sharding.Mesh, rounds: int) -> list[dict]:
    """One row for each of the settings, which take turns. One that the devices' memory can't hold has an `error`
    instead of figures."""
    runs = [Run(settings, mesh) for settings in variants]
    errors = [run.attempt(run.warm_up) for run in runs]
    for _ in range(rounds):
        errors = [error or run.attempt(run.turn) for run, error in zip(runs, errors, strict=True)]
    return [run.failed(error) if error else run.result() for run, error in zip(runs, errors, strict=True)]


def with_sizes(settings: Settings, attn_type: str, update_len: int) -> Settings:
    """The same settings with another attention and update length."""
    return dataclasses.replace(
        settings,
        model=settings.model.replace(attn_type=attn_type),
        train=dataclasses.replace(settings.train, update_len=update_len),
    )


class Run:
    """One config, compiled, and what its turns took."""

    def __init__(self, settings: Settings, mesh: jax.sharding.Mesh):
        self._settings, self._mesh = settings, mesh
        self._seconds = dict(train_step=[], eval_step=[]) | {_sampling(rows): [] for rows in SAMPLED}

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
        self._train_step = make_train_step(settings, self._mesh).lower(self._state, self._batch).compile()
        self._compile_seconds = time.monotonic() - began
        self._eval_step = make_eval_step(settings, self._mesh, rows)
        self._eval_state = make_eval_state(settings, self._mesh, rows)
        sampling = Sampling((True,) * settings.model.n_vocab, top_p=0.95)
        devices = list(self._mesh.devices.flat)
        self._samplers = {rows: Sampler(settings.model, sampling, rows, devices) for rows in SAMPLED}
        self.turn()
        self._seconds = {name: [] for name in self._seconds}

    def turn(self) -> None:
        """One train step, one eval step, and a few sampled tokens of one row and of many."""
        self._time("train_step", self._train)
        self._time("eval_step", self._evaluate)
        for rows in SAMPLED:
            self._time(_sampling(rows), functools.partial(self._sample, rows))

    def attempt(self, function) -> str | None:
        """Calls warm_up or turn; if memory is lacking, lets go of everything and returns what the device said."""
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
        """The row of one that did not fit."""
        return dict(attn_type=self._settings.model.attn_type, update_len=self._settings.train.update_len, error=error)

    def _time(self, name: str, function) -> None:
        began = time.monotonic()
        jax.block_until_ready(function())
        self._seconds[name].append(time.monotonic() - began)

    def _train(self):
        self._state, metrics = self._train_step(self._state, self._batch)
        return self._state, metrics

    def _evaluate(self):
        self._eval_state, sums = self._eval_step(self._state.params, self._eval_state, self._batch)
        return self._eval_state, sums

    def _sample(self, rows: int):
        sampler, prompts = self._samplers[rows], [np.zeros([0], np.int32)] * rows
        for first in range(0, rows, sampler.batch_size):
            group = prompts[first : first + sampler.batch_size]
            for _ in sampler.sample(self._state.params, group, 0, SAMPLED[rows], first_row=first, stop_at_end=False):
                pass

    def result(self) -> dict:
        """What was measured; times in seconds, memory in bytes of one device."""
        train = self._settings.train
        tokens = train.batch_size * train.update_len
        summary = {
            f"{name}_seconds": dict(median=statistics.median(times), min=min(times), max=max(times))
            for name, times in self._seconds.items()
        }
        seconds = summary["train_step_seconds"]["median"]
        memory = self._train_step.memory_analysis()
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
            device_peak_bytes=stats.get("peak_bytes_in_use"),  # of the whole process, where the device counts
        )


def _sampling(rows: int) -> str:
    return f"sampling_{rows}"


def draw(result: dict, path: epath.Path) -> None:
    """A picture of training tokens per second over the length of the update, one line an attention."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for kind in dict.fromkeys(row["attn_type"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["attn_type"] == kind and "error" not in row]
        axes.plot(
            [row["update_len"] for row in rows],
            [row["train_tokens_per_second"] for row in rows],
            marker="o",
            label=kind,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("update length T, tokens")
    axes.set_ylabel("training, tokens a second")
    axes.set_title(f"{result['devices']} x {result['device']}, {result['batch_size']} rows")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture = io.BytesIO()  # the folder may be a bucket's
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    path.write_bytes(picture.getvalue())


def _line(row: dict) -> str:
    if "error" in row:
        return f"{row['attn_type']:>5} T {row['update_len']:>7}: does not fit: {row['error']}"
    train = row["train_step_seconds"]
    sampled = ", ".join(f"{n:,.0f} in {rows} row(s)" for rows, n in row["sampled_tokens_per_second"].items())
    return (
        f"{row['attn_type']:>5} T {row['update_len']:>7}: train step {train['median']:.3f} s "
        f"({train['min']:.3f} .. {train['max']:.3f}), {row['train_tokens_per_second']:,.0f} tokens/s, "
        f"{row['train_flops_per_second'] / 1e9:,.1f} GFLOP/s, {row['peak_bytes'] / 2**20:,.0f} MiB; "
        f"eval {row['eval_tokens_per_second']:,.0f} tokens/s, "
        f"sampling {sampled} tokens/s; "
        f"compiled in {row['compile_seconds']:.1f} s"
    )
