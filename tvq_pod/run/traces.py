"""Traces of some training steps, for xprof: WORKDIR/profile/plugins/profile/step_N/process_I.xplane.pb; and beside them
operations.tsv, which gives the line of code that each operation of the step comes from.

docs/profiling.md says how to read them. Names in a trace: `train` with a number, for each step; what else the host
does, by the kinds of goodput_table.py; and the devices' operations, by the paths of modules and named scopes, which are
also in the plan.
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

WRITE_SECONDS = 120.0  # the longest the end of a run waits for a trace to be in a bucket


def check_hosts(settings: ProfileSettings) -> None:
    """Raises UserError if the settings name a process that the job does not have."""
    last = jax.process_count() - 1
    missing = [index for index in settings.traced_hosts() or () if index > last]
    if settings.at_step and missing:
        here = f"config.profile.hosts={settings.hosts}"
        raise UserError(f"{here}: this job has no process {missing[0]}; the last is {last}")


def start_server(port: int) -> None:
    """Lets xprof capture traces of this process at this port. Raises UserError if the port can't be opened."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", port))
    except OSError as error:
        raise UserError(f"--profiler_port={port}: can't be opened ({error.strerror}); give another port") from None
    jax.profiler.start_server(port)
    say(f"traces can be captured at port {port}")


class Profiler:
    """Traces the steps chosen by the settings, if this process is one that traces.

    A trace begins when the devices have done the previous step, and ends when they have done its last step, so it has
    complete steps only; at both ends the devices wait.
    """

    def __init__(self, workdir: epath.Path, settings: ProfileSettings, goodput: Goodput):
        hosts = settings.traced_hosts()
        self._is_on = settings.at_step > 0 and (hosts is None or jax.process_index() in hosts)
        self._workdir, self._settings, self._goodput = workdir, settings, goodput
        self._first_step: int | None = None  # of the current trace
        self._last_step = 0
        self._folder = ""  # on this machine, where the trace is written
        self._unended = False  # the previous trace could not be written
        self._writer: threading.Thread | None = None

    @contextlib.contextmanager
    def step(self, step: int, before: dict | None) -> Iterator[None]:
        """Wraps the block that dispatches the step that makes `step`. before: metrics of the previous step, or None if
        there was none."""
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
            except Exception as error:  # each kind of storage has its own; and what compilers write may change
                _warn(path, error)

    def end_step(self, step: int, metrics: dict) -> None:
        """Call when the step was dispatched. metrics: the step's metrics."""
        if self._first_step is not None and step >= self._last_step:
            jax.block_until_ready(metrics)
            self.end()

    def _begin(self, step: int, before: dict | None) -> None:
        jax.block_until_ready(before)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down the steps
        with self._goodput.on(PROFILE):
            try:
                if self._unended:  # jax starts no other trace until it has written that one
                    jax.profiler.stop_trace()
                    self._discard()
                self._folder = tempfile.mkdtemp(prefix="tvq_pod-profile-")
                jax.profiler.start_trace(self._folder, profiler_options=options)
            except Exception as error:  # a full disk; or somebody is capturing a trace with --profiler_port
                self._discard(self._unended)
                tell(f"WARNING: the trace of step {step} is not taken ({' '.join(str(error).split())[:200]})")
                return
        self._first_step, self._last_step = step, step + self._settings.num_steps - 1

    def end(self) -> None:
        """Ends the current trace, if there is one, and writes it in the background."""
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
        self._folder = ""  # the writer owns it now

    def close(self) -> None:
        """Ends the current trace, and waits until all are written."""
        self.end()
        self._wait()

    def _discard(self, unended: bool = False) -> None:
        """Deletes the local folder. unended: jax still has the trace that belongs in it."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._unended = unended

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join(WRITE_SECONDS)


def _move(folder: pathlib.Path, path: epath.Path) -> None:
    """Moves the one trace in a local folder to `path`, which may be in a bucket."""
    try:
        (found,) = folder.rglob("*.xplane.pb")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, found.read_bytes())
        say(f"trace: {path}")
    except Exception as error:  # each kind of storage has its own
        _warn(path, error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _warn(path: epath.Path, error: Exception) -> None:
    tell(f"WARNING: {path} can't be written ({' '.join(str(error).split())[:200]})")
