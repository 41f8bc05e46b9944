"""Processes that write parts of a store side by side. They do not import jax, which takes seconds and memory."""

import concurrent.futures
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

from tvq_pod.data.cut import count_lines, lines_before
from tvq_pod.data.part import PartTask, write_part
from tvq_pod.data.sources import File
from tvq_pod.data.vocab import Vocab
from tvq_pod.data.workers import SPAWN, begin_worker, killed, main_left_alone, signals_kept


class _Stopped(Exception):
    """In a worker: another one has failed."""


class Workers:
    """Processes that write parts; with one, this process does."""

    def __init__(self, n_processes: int, vocab: Vocab, tell: Callable[[int], object]):
        """tell: is called as they get on, with the bytes of text that were taken since it was called last."""
        self._n_processes, self._vocab, self._tell = n_processes, vocab, tell
        self._taken, self._stop = SPAWN.Value("Q", 0), SPAWN.Event()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self._n_processes > 1:
            shared = self._vocab, self._taken, self._stop
            with signals_kept():
                self._pool = concurrent.futures.ProcessPoolExecutor(self._n_processes, SPAWN, _begin, shared)
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def write(self, tasks: list[PartTask], spans: list[File]) -> None:
        """Counts the lines of parts of files, and writes parts of a store. Raises what one of them raises; others are
        ended."""
        futures = self._submitted(count_lines, spans)
        before = lines_before(spans, map(count_lines, spans) if futures is None else self._results(futures))
        tasks = [task.numbered(before) for task in tasks]
        futures = self._submitted(_write, tasks)
        if futures is not None:
            self._results(futures)
            return
        for task in tasks:
            write_part(task, self._vocab, self._tell)

    def _submitted(self, function, arguments: list) -> list[concurrent.futures.Future] | None:
        """A call with each argument, in other processes; None if there are none."""
        if not self._pool:
            return None
        try:
            with main_left_alone(), signals_kept():
                return [self._pool.submit(function, argument) for argument in arguments]
        except BrokenProcessPool:
            raise killed() from None

    def _results(self, futures: list[concurrent.futures.Future]) -> list:
        """What each returns, in their order."""
        told, waiting = 0, set(futures)
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_EXCEPTION)
                if done or self._taken.value > told:  # no worker hangs, or not all of them
                    taken = self._taken.value
                    self._tell(taken - told)
                    told = taken
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise killed() from None
        except BaseException:
            self._stop.set()
            raise
        return [future.result() for future in futures]


_of_worker: tuple = ()  # in a worker: the vocabulary, bytes taken by all, and whether to stop


def _begin(*shared) -> None:
    global _of_worker
    _of_worker = shared
    begin_worker()


def _write(task: PartTask) -> None:
    vocab, taken, stop = _of_worker

    def tell(n_bytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        with taken.get_lock():
            taken.value += n_bytes

    write_part(task, vocab, tell)
