"""Where numbers go: metrics.jsonl, TensorBoard events, and, on request, W&B. Process 0 writes, the others don't."""

import contextlib
import hashlib
import importlib.util
import json
import math
import os

from etils import epath

from tvq_pod.config import MetricsSettings
from tvq_pod.errors import UserError
from tvq_pod.paths import is_bucket
from tvq_pod.progress import say

LOG_2 = math.log(2.0)


def bits_per_byte(nats_per_token: float, tokens_per_byte: float) -> float:
    """Cross-entropy per byte of text, whatever the vocabulary."""
    return nats_per_token / LOG_2 * tokens_per_byte


def check_packages(settings: MetricsSettings) -> None:
    """Raises UserError if W&B is asked for and not installed."""
    if settings.wandb_project and not importlib.util.find_spec("wandb"):
        raise UserError(f"config.metrics.wandb_project={settings.wandb_project}: needs pip install -e '.[wandb]'")


class MetricsWriter:
    """Appends numbers of a run to its folder. In a bucket there are no TensorBoard events, only metrics.jsonl.

    A run that is killed between a log and a checkpoint logs those steps again when it goes on: of two lines with the
    same step and split, the later one counts. Their losses agree: every checkpoint has a line, so no mean spans one.
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
        if settings.tensorboard and not is_bucket(workdir):
            self._events = Events(str(workdir / "tensorboard"))
        if settings.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=settings.wandb_project,
                name=workdir.name,
                id=hashlib.sha256(os.path.abspath(workdir).encode()).hexdigest()[:16],  # the same when it goes on
                resume="allow",
                dir=str(workdir),
                config=config,
            )

    def write(self, step: int, split: str, values: dict) -> None:
        """One line, and one point per number: step, split, and values: numbers, lists of them (one for each unit of the
        model), or texts, which only the line has. What is not finite is null in the line."""
        if self._file is None:
            return
        line = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(dict(step=step, split=split, **line)) + "\n")
        points = {f"{split}/{name}": value for name, value in _points(values)}
        if self._events:
            self._events.add(points, step)
        if self._wandb:
            self._wandb.log(points, step=step)

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()


def lines_of(workdir: epath.Path, split: str) -> dict[int, dict]:
    """The lines of a split in metrics.jsonl, by step; of two with the same step, the later one. Those
    that were cut off are left out."""
    lines, path = {}, workdir / "metrics.jsonl"
    for text in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            if line["split"] == split:
                lines[int(line["step"])] = line
    return lines


def _finite(value):
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if math.isfinite(value) else None


def _points(values: dict):
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        elif not isinstance(value, str):
            yield name, value


class LocalFile:
    """A text file that is appended to. What a full disk does not take is kept, and written with what comes next."""

    def __init__(self, path: epath.Path):
        torn = False
        if path.exists() and os.path.getsize(path):
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
        self._path, self._warned = path, False
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._pending = b"\n" if torn else b""  # the process before us was killed while it wrote

    def write(self, text: str) -> None:
        if not self._pending.strip():
            self._warned = False
        self._pending += text.encode()
        try:
            self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                say(f"WARNING: {self._path} can't be written ({error.strerror}): its lines are kept for later")
            self._warned = True

    def close(self) -> None:
        """Writes what is left, if it can."""
        if self._pending:
            self.write("")
        self._file.close()


class Events:
    """TensorBoard's event files. tensorboardX writes them in a thread, which ends for good at its first error, such as
    a full disk; then another file is begun."""

    def __init__(self, folder: str):
        self._folder = folder
        self._writer = None

    def add(self, points: dict[str, float], step: int) -> None:
        """Of one step: numbers by name."""
        from tensorboardX import SummaryWriter  # which takes a while: it imports what it may find of clouds

        try:
            if self._writer is None or not self._writer.file_writer.event_writer._worker.is_alive():
                self._writer = SummaryWriter(self._folder, max_queue=1000, flush_secs=30)
            for name, value in points.items():
                self._writer.add_scalar(name, value, step)
        except OSError:  # the next step may have more luck; metrics.jsonl has the numbers
            self._writer = None

    def close(self) -> None:
        """Flushes."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


class BucketFile:
    """A text file in a bucket. Objects can't be appended to, so each write uploads all of it: fit for small files."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._text = path.read_text() if path.exists() else ""

    def write(self, text: str) -> None:
        self._text += text
        self._path.write_text(self._text)

    def close(self) -> None:
        """Nothing is left to write."""
