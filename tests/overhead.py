"""What it costs to see what a run does. Not a test: `python -m tests.overhead` prints shares of a step's time.

Blocks of steps take turns, in one process, on the same batch: without, and with what the training loop calls to count
time, to name steps in a trace, and to fill a line of metrics; and, of two more programs, without norms by layer and
with them. The time of a block over that of the block before it, without, is one observation. Machines drift and others
work on them, so medians of many are printed, with their quartiles.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time

import jax
import numpy as np
from etils import epath

from tests.common import small_config
from tvq_pod.config.settings import MeshSettings, OptimizerSettings, ProfileSettings, Settings, TrainSettings
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.sharding import batch_sharding
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.traces import Profiler
from tvq_pod.run.training_log import peak_memory
from tvq_pod.training.step import TrainStep, create_train_state, make_train_step

LINE = 20  # steps between two lines of metrics, the default


@functools.cache
def step_of(settings: Settings) -> TrainStep:
    """Compiled once for all that take turns with the same one."""
    return make_train_step(settings, make_mesh(MeshSettings()))


class Run:
    """A compiled step, its state, and the loop around it."""

    def __init__(self, settings: Settings, batch_of, watched: bool):
        """watched: with all that the training loop calls."""
        mesh = make_mesh(MeshSettings())
        self._batch, self._watched = batch_of(mesh), watched
        self._state = create_train_state(settings, mesh)
        self._step = step_of(settings)
        self._goodput = Goodput()
        self._profiler = Profiler(epath.Path(tempfile.gettempdir()), ProfileSettings(), self._goodput)
        self._numbers = itertools.count(1)

    def block(self, n_steps: int) -> np.ndarray:
        """Seconds of so many steps: by the clock, and of CPU time, of all threads."""
        batches, behind = itertools.repeat(self._batch, n_steps), None
        began = np.array([time.perf_counter(), time.process_time()])
        for batch in self._goodput.fetched(batches) if self._watched else batches:
            step = next(self._numbers)
            if self._watched:
                self._goodput.begin_step(step)
                with self._profiler.step(step, behind):
                    self._state, metrics = self._step(self._state, batch)
                    self._goodput.given(metrics["n_bad"])
                    if behind is not None:
                        int(behind["n_bad"])
                self._profiler.end_step(step, metrics)
                if step % LINE == 0:
                    self._goodput.shares()
                    peak_memory()
            else:
                self._state, metrics = self._step(self._state, batch)
                if behind is not None:
                    int(behind["n_bad"])
            behind = metrics
        jax.block_until_ready(behind)
        return np.array([time.perf_counter(), time.process_time()]) - began


def calls(n_steps: int = 20_000) -> float:
    """Seconds that the calls of one step take by themselves, with a result that is there already."""
    goodput = Goodput()
    profiler, done = Profiler(epath.Path(tempfile.gettempdir()), ProfileSettings(), goodput), jax.numpy.zeros([])
    began = time.perf_counter()
    for step, _ in enumerate(goodput.fetched(itertools.repeat(0, n_steps)), 1):
        goodput.begin_step(step)
        with profiler.step(step, None):
            goodput.given(done)
        profiler.end_step(step, {})
        if step % LINE == 0:
            goodput.shares()
            peak_memory()
    seconds = time.perf_counter() - began
    goodput.close()
    return seconds / n_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--d_model", type=int, default=64)
    parser.add_argument("--detail_every_steps", type=int, default=10)
    given = parser.parse_args()
    print(f"the calls of a step, by themselves: {calls() * 1e6:.0f} us")
    widths = dict(d_model=given.d_model, d_k=32, d_v=2 * given.d_model, n_head=1, head_type="shga", n_vocab=259)
    settings = Settings(
        model=small_config(block_len=64, mem_len=64, n_code=64, n_layer=2, is_train=True, **widths),
        train=TrainSettings(batch_size=4, update_len=256),
        optimizer=OptimizerSettings(learning_rate=1e-3),
    )

    def batch_of(mesh):
        shape = settings.train.batch_size, settings.train.update_len
        tokens = np.random.default_rng(0).integers(3, 259, size=shape).astype(np.int32)
        ids, mask = np.zeros(shape, np.int32), np.ones(shape, np.float32)
        return jax.device_put(dict(inputs=tokens, targets=tokens, doc_ids=ids, loss_mask=mask), batch_sharding(mesh))

    detailed = dataclasses.replace(settings.train, detail_every_steps=given.detail_every_steps)
    runs = {
        "without": Run(settings, batch_of, watched=False),
        "counted and named": Run(settings, batch_of, watched=True),
        "without, again": Run(settings, batch_of, watched=False),
        f"norms every {given.detail_every_steps} steps": Run(
            dataclasses.replace(settings, train=detailed), batch_of, watched=False
        ),
    }
    for run in runs.values():
        run.block(given.steps)
    seconds = [{name: run.block(given.steps) for name, run in runs.items()} for _ in range(given.rounds)]
    for kind, measure in enumerate(("by the clock", "CPU time")):
        step = statistics.median(times["without"][kind] for times in seconds) / given.steps
        print(f"{measure}: a step takes {step * 1e3:.2f} ms, {given.rounds} rounds of {given.steps} steps each")
        for name in list(runs)[1:]:
            more = [times[name][kind] / times["without"][kind] - 1 for times in seconds]
            low, middle, high = statistics.quantiles(more, n=4)
            print(f"  {name}: {middle:+.2%} (quartiles {low:+.2%}, {high:+.2%})")


if __name__ == "__main__":
    main()
