"""Traces of some training steps, for xprof: WORKDIR/profile/plugins/profile/step_N/process_I.xplane.pb; and beside
them operations.tsv, which says what line of the code made each operation of the step.

docs/profiling.md says how to read them. Names in a trace: the steps, `train` with their numbers; what the host does
besides, by the kinds of goodput_table.py; and operations of the devices, by the paths of modules and named scopes that
the plan has too.
"""

import contextlib
import pathlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator

import jax
from etils import epath

from tvq_pod.config.settings import ProfileSettings
from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole
from tvq_pod.host.terminal import say, tell
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.goodput_table import PROFILE

WRITE_SECONDS = 120.0  # that the end of a run waits for a trace to be in a bucket


def check_hosts(settings: ProfileSettings) -> None:
    """Raises UserError if a process is to trace that the job does not have."""
    last = jax.process_count() - 1
    missing = [index for index in settings.traced_hosts() or () if index > last]
    if settings.at_step and missing:
        here = f"config.profile.hosts={settings.hosts}"
        raise UserError(f"{here}: this job has no process {missing[0]}; the last is {last}")


def start_server(port: int) -> None:
    """From now on xprof can capture traces of this process, at this port. Raises UserError if the port can't be had."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", port))
    except OSError as error:
        raise UserError(f"--profiler_port={port}: can't be opened ({error.strerror}); give another port") from None
    jax.profiler.start_server(port)
    say(f"traces can be captured at port {port}")


class Profiler:
    """Traces the steps that the settings name, if this process is one of those that trace.

    A trace begins when the devices have done the step before, and ends when they have done its last step, so it has
    whole steps only; the devices wait for that, at its two ends.
    """

    def __init__(self, workdir: epath.Path, settings: ProfileSettings, goodput: Goodput):
        hosts = settings.traced_hosts()
        self._is_on = settings.at_step > 0 and (hosts is None or jax.process_index() in hosts)
        self._workdir, self._settings, self._goodput = workdir, settings, goodput
        self._first_step: int | None = None  # of the trace that is being taken
        self._last_step = 0
        self._folder = ""  # of this machine, where it is written
        self._unended = False  # the trace before could not be written
        self._writer: threading.Thread | None = None

    @contextlib.contextmanager
    def step(self, step: int, before: dict | None) -> Iterator[None]:
        """In the block the devices are given the step that makes `step`. before: metrics of the step before, or None
        if there was none."""
        if self._is_on and self._first_step is None and self._settings.begins_at(step):
            self._begin(step, before)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def keep_operations(self, table: Callable[[], str]) -> None:
        """Writes WORKDIR/profile/operations.tsv, if there will be traces. table: returns its text."""
        hosts = self._settings.traced_hosts()
        if not self._is_on or jax.process_index() != min(hosts or (0,)):
            return
        path = self._workdir / "profile" / "operations.tsv"
        with self._goodput.on(PROFILE):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, table())
            except Exception as error:  # each store has its own; and what compilers write may change
                _warn(path, error)

    def end_step(self, step: int, metrics: dict) -> None:
        """The devices were given the step. metrics: of it."""
        if self._first_step is not None and step >= self._last_step:
            jax.block_until_ready(metrics)
            self.end()

    def _begin(self, step: int, before: dict | None) -> None:
        jax.block_until_ready(before)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows the steps that it is to show
        with self._goodput.on(PROFILE):
            try:
                if self._unended:  # jax takes no other trace until it could write that one
                    jax.profiler.stop_trace()
                    self._discard()
                self._folder = tempfile.mkdtemp(prefix="tvq_pod-profile-")
                jax.profiler.start_trace(self._folder, profiler_options=options)
            except Exception as error:  # a full disk; or somebody captures a trace by --profiler_port
                self._discard(self._unended)
                tell(f"WARNING: the trace of step {step} is not taken ({' '.join(str(error).split())[:200]})")
                return
        self._first_step, self._last_step = step, step + self._settings.num_steps - 1

    def end(self) -> None:
        """Ends the trace that is being taken, if there is one, and writes it in the background."""
        if self._first_step is None:
            return
        step, self._first_step = self._first_step, None
        with self._goodput.on(PROFILE):
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # a full disk
                self._discard(unended=True)
                tell(f"WARNING: the trace of step {step} can't be written ({' '.join(str(error).split())[:200]})")
                return
        self._wait()
        target = self._workdir / "profile" / "plugins" / "profile" / f"step_{step}"
        path = target / f"process_{jax.process_index()}.xplane.pb"
        self._writer = threading.Thread(target=_move, args=(pathlib.Path(self._folder), path), daemon=True)
        self._writer.start()
        self._folder = ""  # it is the writer's now

    def close(self) -> None:
        """Ends the trace that is being taken, and waits until all are written."""
        self.end()
        self._wait()

    def _discard(self, unended: bool = False) -> None:
        """Deletes the local folder. unended: jax still has the trace that belongs there."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._unended = unended

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join(WRITE_SECONDS)


def _move(folder: pathlib.Path, path: epath.Path) -> None:
    """The one trace of a local folder, to where it belongs, which may be a bucket."""
    try:
        (found,) = folder.rglob("*.xplane.pb")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, found.read_bytes())
        say(f"trace: {path}")
    except Exception as error:  # each store has its own
        _warn(path, error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _warn(path: epath.Path, error: Exception) -> None:
    tell(f"WARNING: {path} can't be written ({' '.join(str(error).split())[:200]})")
