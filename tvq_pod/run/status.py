"""WORKDIR/status.json: what a run is doing, in one small file, for other programs such as launch.pod.

    state         starting, training, preempted (saved: run me again), done, or failed
    step, num_steps, loss, bits_per_byte, tokens_per_second, eta_seconds     as last logged
    saved_step    the newest step on disk; saved_at, when it was saved, in seconds since 1970, as all times below
    started_at    when this session began
    time          when the run last made progress: it logged a step, or its state changed
    alive_at      when the file was written: every 10 seconds, also while a run compiles or evaluates
    goodput       where the time of all sessions went; see goodput.py
    error         why it failed, in one line
    run_id        the environment's TVQ_POD_RUN_ID: which launch it belongs to

A process that is killed leaves the file as it last wrote it.
"""

import contextlib
import json
import math
import os
import threading
import time
from typing import Any

from etils import epath

from tvq_pod.errors import Preempted
from tvq_pod.host.files import write_whole
from tvq_pod.host.terminal import say
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.goodput_table import table

EVERY_SECONDS = 10.0  # changes of state are written at once


class Status(contextlib.AbstractContextManager):
    """Writes the file from the beginning to the end of a session, and also how it ends. Does nothing on processes other
    than 0.

    It never causes a run to end: what can't be written is left out.
    """

    def __init__(self, workdir: epath.Path, num_steps: int, enabled: bool = True, goodput: Goodput | None = None):
        """goodput: counts this session's time; by default one that begins now."""
        self._path = workdir / "status.json" if enabled else None
        self.goodput = goodput or Goodput()
        self._values: dict[str, Any] = dict(
            state="starting",
            num_steps=num_steps,
            run_id=os.environ.get("TVQ_POD_RUN_ID", ""),
            started_at=self.goodput.started_at,
            time=time.time(),
        )
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._writer = threading.Thread(target=self._write_on, daemon=True)
        self._begun = False

    @property
    def values(self) -> dict[str, Any]:
        """The current values of the file's fields."""
        return dict(self._values)

    def begin(self) -> None:
        """Starts writing the file: a run that is refused before this leaves the file untouched. Continues the earlier
        sessions' counts of the run's time."""
        if self._path is not None:
            with contextlib.suppress(Exception):  # the file does not exist, or is not a status
                before = json.loads(self._path.read_text())
                self.goodput.resume(before.get("goodput"))
                if before["saved_step"] == self._values.get("saved_step"):
                    self._values["saved_at"] = before["saved_at"]
        self._begun = True
        self._write()
        if self._path is not None:
            self._writer.start()

    def update(self, step: int, **values) -> None:
        """Records a step that was trained. Numbers that are not finite are null. The file is written within
        EVERY_SECONDS: training does not wait for a bucket."""
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._values.update(state="training", step=step, time=time.time(), **values)

    def saved(self, step: int | None) -> None:
        """Records the newest step on disk; None if there is none."""
        if step != self._values.get("saved_step"):
            self._values.update(saved_step=step, saved_at=time.time())
        if step is not None:
            self._values.setdefault("step", step)

    def __exit__(self, kind, error, trace):
        if kind is None:
            self._values.update(state="done")
        elif issubclass(kind, Preempted):
            self._values.update(state="preempted")
        else:
            self._values.update(state="failed", error=" ".join(str(error).split())[:500] or kind.__name__)
        self._values.update(time=time.time())
        self._ended.set()
        self.goodput.close()
        self._write()
        if self._begun and self._path is not None and (kind is None or issubclass(kind, Preempted)):
            say(table(self.goodput.record()))

    def _write_on(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self._write()

    def _write(self) -> None:
        if self._path is None or not self._begun or not self._lock.acquire(timeout=60.0):
            return
        try:
            text = json.dumps(self._values | dict(alive_at=time.time(), goodput=self.goodput.record())) + "\n"
            with contextlib.suppress(Exception):  # a full disk, or no network: the next write may succeed
                write_whole(self._path, text)
        finally:
            self._lock.release()
