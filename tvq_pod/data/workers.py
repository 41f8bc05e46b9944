"""Other processes of this machine that help to prepare a store: how they start, and that they end with the main one."""

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
    """Processes that are started in here do not import the program's main module: it takes them seconds, for jax."""
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
    """Processes that are started in here do not get what a terminal or Slurm sends to all at once: the main process
    decides, and they end with it, without a word."""
    kept = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kept)
    quiet = "ignore:resource_tracker"  # what the main process leaves behind is cleaned up, and no news
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, kept)
        sys.warnoptions.remove(quiet)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """What such a process does first."""
    gc.set_threshold(100_000)  # a batch of tiny documents is many objects
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process of its own
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def killed() -> UserError:
    """What to raise when such a process was killed."""
    return UserError(
        "config.data.prepare_processes: a process that encodes text was killed, perhaps for its memory; give "
        "fewer, and start again"
    )
