"""Lines of training: means over some steps, to metrics.jsonl, to status.json, and to the terminal."""

from collections.abc import Sequence

import jax
import numpy as np

from tvq_pod.data import digest
from tvq_pod.host.terminal import say
from tvq_pod.run.metrics import MetricsWriter, bits_per_byte
from tvq_pod.run.progress import Speed, hours
from tvq_pod.run.status import Status

STATUS_VALUES = ("loss", "bits_per_byte", "tokens_per_second", "eta_seconds")


class TrainingLog:
    """Collects each step's metrics. A line is fetched from the device only once the device has its next step to do."""

    def __init__(
        self,
        writer: MetricsWriter,
        status: Status,
        speed: Speed,
        *,
        num_steps: int,
        every_steps: int,
        tokens_per_byte: float,
    ):
        """tokens_per_byte: of the training split, for bits per byte."""
        self._writer, self._status, self._speed = writer, status, speed
        self._num_steps, self._every_steps, self._tokens_per_byte = num_steps, every_steps, tokens_per_byte
        self._interval: list[dict] = []  # since the last line
        self._waiting: tuple[int, list[dict]] | None = None  # a line that is due: its step, and the metrics

    def add(self, step: int, metrics: dict) -> None:
        """A step was given to the device; metrics: see `make_train_step`. Writes the line that was due before it."""
        self.write_due()
        self._interval.append(metrics)
        if step % self._every_steps == 0:
            self.end_line(step)

    def end_line(self, step: int) -> None:
        """A line is due at `step`, the last that was added, whatever the interval."""
        if self._interval:
            self._waiting, self._interval = (step, self._interval), []

    def write_due(self) -> None:
        """Writes the line that is due, if one is: waits for its step."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        values = means(jax.device_get(metrics)) | self._speed.seen(step)
        values["bits_per_byte"] = bits_per_byte(values["loss"], self._tokens_per_byte)
        self._writer.write(step, "train", values)
        self._status.update(step=step, **{name: values[name] for name in STATUS_VALUES})
        bad = f"  {values['bad_steps']} bad" if values["bad_steps"] else ""
        say(
            f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  loss {values['loss']:.4f}  "
            f"bits/byte {values['bits_per_byte']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"ETA {hours(values['eta_seconds'])}{bad}"
        )

    def skip(self) -> None:
        """Call after something that is no training (an evaluation): it does not count as slowness."""
        self._speed.skip()

    def restart(self, step: int) -> None:
        """The run goes on from another step: what was collected since the last line is of steps that do not count."""
        self._interval, self._waiting = [], None
        self._speed.restart(step)


def means(metrics: Sequence[dict]) -> dict:
    """Of the steps that were applied; the newest digest, and how many steps were not."""
    good = [m for m in metrics if not m["n_bad"]]
    found = {
        name: np.mean([m[name] for m in good or metrics], axis=0, dtype=np.float64).tolist()
        for name in metrics[0]
        if name not in ("n_bad", "digest")
    }
    by_unit = {f"{name}_by_unit": value for name, value in found.items() if isinstance(value, list)}
    found |= {name.removesuffix("_by_unit"): float(np.mean(value)) for name, value in by_unit.items()}
    return found | by_unit | dict(bad_steps=len(metrics) - len(good), digest=digest.as_text(metrics[-1]["digest"]))
