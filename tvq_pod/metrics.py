"""Where numbers go: metrics.jsonl, TensorBoard events, and, on request, W&B. Process 0 writes, the others don't."""

import hashlib
import importlib.util
import json
import math
import os
from typing import TextIO

from etils import epath
from tensorboardX import SummaryWriter

from tvq_pod.config import MetricsSettings
from tvq_pod.errors import UserError
from tvq_pod.paths import is_bucket

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
        self._file = BucketFile(path) if is_bucket(path) else _open_to_append(path)
        if settings.tensorboard and not is_bucket(workdir):
            self._events = SummaryWriter(str(workdir / "tensorboard"), max_queue=1000, flush_secs=30)
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
        """One line, and one point per value: step, split, and values (floats and ints)."""
        if self._file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(dict(step=step, split=split, **finite)) + "\n")
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(f"{split}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()


def has_line(workdir: epath.Path, step: int, split: str) -> bool:
    """Whether metrics.jsonl has a line of that step and split."""
    path = workdir / "metrics.jsonl"
    head = json.dumps(dict(step=step, split=split))[:-1]  # as `write` begins it
    return path.exists() and any(line.startswith(head) for line in path.read_text().splitlines())


def _open_to_append(path: epath.Path) -> TextIO:
    torn = False
    if path.exists() and os.path.getsize(path):
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
    file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    if torn:  # the process before us was killed while it wrote
        file.write("\n")
    return file


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
