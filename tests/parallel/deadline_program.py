"""One process of a job in which something hangs, for test_deadlines.py: PORT INDEX SCENARIO FOLDER."""

import itertools
import pathlib
import sys
import threading
import time

import jax
import numpy as np
from etils import epath

from tests.common import small_config
from tvq_pod.config.settings import CheckpointSettings, EvalSettings, MeshSettings, Settings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.store import TokenStore
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.inference.evaluator import Evaluator
from tvq_pod.parallel import processes
from tvq_pod.parallel.deadlines import Deadline, still_working
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.sharding import on_one_device, replicated
from tvq_pod.run import manifest
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.training.step import TrainState

port, index, scenario, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
SECONDS = 4


def hang(*_args) -> None:
    """As a thread hangs in the kernel or in C++: no exception reaches it, and other threads run."""
    print("hangs", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def frozen() -> None:
    """One process is stopped by the test, in the agreement."""
    if index == 1:
        print("hangs", flush=True)
        sys.stdin.readline()
    processes.all_agree(True)


def restore() -> None:
    """One process can't read: its half of the files are pipes that nobody writes to (see test_deadlines.py)."""
    settings = CheckpointSettings(restore_timeout_seconds=SECONDS)
    Checkpoints(epath.Path(folder), settings).newest_good()


def save() -> None:
    """Process 0 hangs where the save gets its name."""
    checkpoints = Checkpoints(epath.Path(folder), CheckpointSettings(timeout_seconds=SECONDS // 2))
    if index == 0:
        manifest.write_manifest = hang
    everywhere = replicated(make_mesh(MeshSettings()))
    array = jax.make_array_from_callback((2,), everywhere, lambda _: np.zeros(2))
    state = TrainState(
        step=array, params={"a": array}, opt_state=(), recurrent={"a": array}, bad_steps={}, digest=array
    )
    checkpoints.save(state, 1, {}, DataSchedule.begin(1, 1))
    checkpoints.wait_for_all()
    checkpoints.close()


def first() -> None:
    """Process 0 works for longer than the others would wait, but is seen to work; the next time it hangs."""

    def work():
        began = time.monotonic()
        while time.monotonic() < began + 1.5 * SECONDS:
            still_working()
            time.sleep(SECONDS / 20)

    processes.on_process_zero(work)
    print("worked", flush=True)
    processes.on_process_zero(hang)


def gather() -> None:
    """One process does not take part in gathering the parameters."""
    mesh = make_mesh(MeshSettings())
    params = jax.make_array_from_callback((2,), jax.NamedSharding(mesh, jax.P("data")), lambda _: np.zeros(1))
    if index == 1:
        hang()
    print(on_one_device(params, mesh))


def evaluation() -> None:
    """One process hangs between two steps of an evaluation, whose steps are the least that processes do together."""
    settings = Settings(
        model=small_config(n_layer=1, n_vocab=ByteVocab.n_vocab, block_len=4, mem_len=4),
        train=TrainSettings(batch_size=2, update_len=8),
        eval=EvalSettings(batch_size=2),
    )
    mesh = make_mesh(settings.mesh)
    evaluator = Evaluator(settings, mesh, TokenStore(folder / "store"), "train")
    everywhere = (None, replicated(mesh))
    evaluator._eval_step = jax.jit(
        lambda params, state, batch: (state, 2.0 * batch["loss_mask"]), out_shardings=everywhere
    )
    steps = itertools.count()
    evaluator.evaluate({}, lambda: next(steps) and index and hang())


def renewed() -> None:
    """Of one process: the time begins again and again, until it hangs."""
    began = time.monotonic()
    with Deadline("the block", 0.5, "config.some.setting=0.5") as deadline:
        while time.monotonic() < began + 1.0:
            time.sleep(0.05)
            deadline.renew()
        print("renewed", flush=True)
        with Deadline("what is inside", 0.1, "config.other.setting=0.1"):  # the outermost counts
            hang()


if scenario != "renewed":
    processes.join(f"127.0.0.1:{port}", 2, index, False, wait_timeout_seconds=SECONDS)
globals()[scenario]()
print("done", flush=True)
