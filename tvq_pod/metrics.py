"""Where numbers go: metrics.jsonl, TensorBoard events, and, on request, W&B. Process 0 writes, the others don't."""

import json
import math
import pathlib

from tensorboardX import SummaryWriter

from tvq_pod.config import MetricsSettings
from tvq_pod.errors import UserError

LOG_2 = math.log(2.0)


def bits_per_byte(nats_per_token: float, tokens_per_byte: float) -> float:
    """Cross-entropy per byte of text, whatever the vocabulary."""
    return nats_per_token / LOG_2 * tokens_per_byte


class MetricsWriter:
    """Appends numbers of a run to its folder.

    A run that is killed between a log and a checkpoint logs those steps again when it goes on: of two lines with the
    same step and split, the later one counts. They agree.
    """

    def __init__(
        self, workdir: pathlib.Path, settings: MetricsSettings, config: dict | None = None, enabled: bool = True
    ):
        """config: the run's settings, for W&B. enabled: False on all processes but 0."""
        self._file = self._events = self._wandb = None
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", buffering=1, encoding="utf-8")
        if torn:  # the process before us was killed in the middle of a line
            self._file.write("\n")
        if settings.tensorboard:
            self._events = SummaryWriter(str(workdir / "tensorboard"), max_queue=1000, flush_secs=30)
        if settings.wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    f"config.metrics.wandb_project={settings.wandb_project}: needs pip install 'tvq_pod[wandb]'"
                ) from None
            self._wandb = wandb.init(
                project=settings.wandb_project, id=workdir.name, resume="allow", dir=str(workdir), config=config
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
