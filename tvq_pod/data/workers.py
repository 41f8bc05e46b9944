"""Starting worker processes on this machine that help to prepare a store, and ending them with the main process."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection, resource_tracker

from tvq_pod.errors import UserError

SPAWN = multiprocessing.get_context("spawn")  # jax has threads: a fork could hang


@contextlib.contextmanager
def main_left_alone() -> Iterator[None]:
    """Keeps processes started inside the block from importing the program's main module, which takes seconds for
    jax."""
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__spec__", "__file__") if name in main.__dict__}
    try:
        main.__spec__ = None
        yield
    finally:
        del main.__spec__
        main.__dict__.update(hidden)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Shields processes started inside the block from signals that a terminal or Slurm sends to all processes: the main
    process handles them, and the workers end with it silently."""
    kept = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kept)
    quiet = "ignore:resource_tracker"  # what the main process leaves behind is cleaned up without a warning
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, kept)
        sys.warnoptions.remove(quiet)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """Sets up a worker process; it calls this first."""
    gc.set_threshold(100_000)  # a batch of tiny documents is many objects
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has its own process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def killed() -> UserError:
    """Returns the error to raise after a worker process was killed."""
    return UserError(
        "config.data.prepare_processes: a process that encodes text was killed, perhaps for lack of memory; give "
        "fewer processes and start again"
    )
