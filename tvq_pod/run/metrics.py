"""Metrics writers: metrics.jsonl, TensorBoard events, and, on request, W&B. Only process 0 writes."""

import contextlib
import json
import math
import os
import secrets
import tempfile
from typing import Any

from etils import epath

from tvq_pod.config.settings import MetricsSettings
from tvq_pod.errors import UserError
from tvq_pod.host.bucket_file import BucketFile
from tvq_pod.host.extras import require
from tvq_pod.host.files import write_whole
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say
from tvq_pod.run.event_files import Events

LOG_2 = math.log(2.0)
FLUSH_SECONDS = 10.0  # the longest a checkpoint waits until a bucket has the lines before it


def bits_per_byte(nats_per_token: float, tokens_per_byte: float) -> float:
    """The cross-entropy in bits per byte of text, which does not depend on the vocabulary."""
    return nats_per_token / LOG_2 * tokens_per_byte


def check_packages(settings: MetricsSettings) -> None:
    """Raises UserError if W&B is requested and not installed."""
    if settings.wandb_project:
        require("wandb", f"config.metrics.wandb_project={settings.wandb_project}: W&B")


class MetricsWriter:
    """Appends numbers of a run to files in its folder. They are uploaded to a bucket in the background.

    A run that is killed between a log and a checkpoint logs those steps again when it resumes: of two lines with the
    same step and split, the later one counts. Their losses agree: a line is written at every checkpoint, so no mean
    spans one.
    """

    def __init__(
        self, workdir: epath.Path, settings: MetricsSettings, config: dict | None = None, enabled: bool = True
    ):
        """config: the run's settings, for W&B. enabled: False on all processes but 0."""
        self._file = self._events = self._wandb = None
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        self._file = BucketFile(path) if is_bucket(path) else LocalFile(path)
        if settings.tensorboard:
            self._events = Events(str(workdir / "tensorboard"))
        if settings.wandb_project:
            self._wandb = Wandb(workdir, settings.wandb_project, config)

    def write(self, step: int, split: str, values: dict) -> None:
        """Writes one line, and one point per number. values: numbers, lists of numbers (one for each unit of the
        model), or texts, which only the line has. Numbers that are not finite are null in the line."""
        if self._file is None:
            return
        line = {name: finite(value) for name, value in values.items()}
        self._file.write((json.dumps(dict(step=step, split=split, **line)) + "\n").encode())
        points = {f"{split}/{name}": value for name, value in _points(values)}
        if self._events:
            self._events.add(points, step)
        if self._wandb:
            self._wandb.log(points, step)

    def flush(self) -> bool:
        """Waits, at most FLUSH_SECONDS, until a bucket has every line that was written, and returns whether it has. Any
        thread may call this."""
        if not isinstance(self._file, BucketFile):
            return True
        if self._events:
            self._events.flush()
        return self._file.flush(FLUSH_SECONDS)

    def close(self) -> None:
        """Flushes and closes all writers."""
        if self._file is not None:
            self._file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.close()


def lines_of(workdir: epath.Path, split: str) -> dict[int, dict]:
    """The lines of a split in metrics.jsonl, by step; of two with the same step, the later one. Truncated lines are
    left out."""
    return {line["step"]: line for line in all_lines(workdir) if line["split"] == split}


def all_lines(workdir: epath.Path) -> list[dict]:
    """The lines of metrics.jsonl, in order. Truncated lines are left out."""
    lines, path = [], workdir / "metrics.jsonl"
    for text in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            lines.append(line | dict(step=int(line["step"]), split=line["split"]))
    return lines


def finite(value):
    """The value for JSON: None in place of numbers that are not finite, also within lists."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return [finite(v) for v in value]
    return value if math.isfinite(value) else None


def _points(values: dict):
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        elif not isinstance(value, str):
            yield name, value


class LocalFile:
    """A text file that is appended to. Text that can't be written to a full disk is kept, and written with the next."""

    def __init__(self, path: epath.Path):
        torn = False
        if path.exists() and os.path.getsize(path):
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
        self._path, self._warned = path, False
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._pending = b"\n" if torn else b""  # the previous process was killed while it was writing

    def write(self, data: bytes) -> None:
        if not self._pending.strip():
            self._warned = False
        self._pending += data
        try:
            self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                say(f"WARNING: {self._path} can't be written ({error.strerror}): its lines are kept for later")
            self._warned = True

    def close(self) -> None:
        """Writes the text that was kept, if it can, and closes the file."""
        if self._pending:
            self.write(b"")
        self._file.close()


class Wandb:
    """A W&B run that continues wherever the training does: its id is in WORKDIR/wandb_id.

    W&B accepts rows in increasing order only, but training may reach a step again, after a kill or when it goes back.
    So the training step is a separate value, `step`, which is the x axis of the charts. The row's number is the step,
    too, unless that row or a later one was sent before.
    """

    def __init__(self, workdir: epath.Path, project: str, config: dict | None):
        """Raises UserError if W&B refuses the run. If it can't be reached, the run is kept on this machine."""
        import wandb
        from wandb import errors

        self._step, self._row, self._failed = None, 0, False
        for line in all_lines(workdir):
            self._next_row(line["step"])
        settings: dict[str, Any] = dict(
            project=project, name=workdir.name, id=_wandb_id(workdir), resume="allow", config=config,
            dir=os.environ.get("WANDB_DIR") or _wandb_folder(workdir),
        )  # fmt: skip
        try:
            self._run = wandb.init(**settings)
        except errors.AuthenticationError as error:
            raise _refused(project, error) from None
        except errors.CommError as error:
            why = " ".join(str(error).split())[:200]
            say(f"WARNING: W&B can't be reached ({why}): its run is kept in {settings['dir']}/wandb for `wandb sync`")
            wandb.teardown()  # it considers the run's id to be in use
            self._run = wandb.init(**settings, mode="offline")
        except errors.Error as error:
            raise _refused(project, error) from None
        self._step, self._row = None, max(self._row, self._run.step - 1)  # what other sessions sent
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, points: dict[str, float], step: int) -> None:
        """Sends numbers, by name. An error here never ends the training."""
        try:
            self._run.log(points | dict(step=step), step=self._next_row(step))
        except Exception as error:
            if not self._failed:
                say(f"WARNING: W&B no longer accepts numbers ({' '.join(str(error).split())[:200]})")
            self._failed = True

    def _next_row(self, step: int) -> int:
        """The row for numbers of a step: the same as long as the step is the same."""
        if step != self._step:
            self._step, self._row = step, max(step, self._row + 1)
        return self._row

    def close(self) -> None:
        """Waits until everything is sent."""
        with contextlib.suppress(Exception):
            self._run.finish()


def _wandb_id(workdir: epath.Path) -> str:
    """The run's id, made at its first start. It is kept in the run's folder, so any start from that folder continues
    the run."""
    path = workdir / "wandb_id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    made = secrets.token_hex(8)
    write_whole(path, made + "\n")
    return made


def _wandb_folder(workdir: epath.Path) -> str:
    """The folder for W&B's own files: the run's folder, if it is local."""
    return tempfile.mkdtemp(prefix="tvq_pod-wandb-") if is_bucket(workdir) else os.path.abspath(workdir)


def _refused(project: str, error: Exception) -> UserError:
    why = " ".join(str(error).split())[:300]
    return UserError(
        f"config.metrics.wandb_project={project}: W&B refuses the run ({why}); set WANDB_API_KEY, or WANDB_MODE=offline"
    )
