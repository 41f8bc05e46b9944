"""Lines of training metrics: means over some steps, written to metrics.jsonl, status.json, and the terminal."""

import contextlib
from collections.abc import Sequence

import jax
import numpy as np

from tvq_pod.data import digest
from tvq_pod.host.terminal import say
from tvq_pod.run.goodput import LOGGED
from tvq_pod.run.goodput_table import DATA, EVALUATION, SAVES
from tvq_pod.run.metrics import MetricsWriter, bits_per_byte
from tvq_pod.run.progress import Speed, hours
from tvq_pod.run.status import Status

STATUS_VALUES = ("loss", "bits_per_byte", "tokens_per_second", "mfu", "eta_seconds")
DETAIL = "detail"  # in a step's metrics: norms by layer, which get a line of their own, with this as its split
SHORT = {DATA: "data", SAVES: "saves", EVALUATION: "eval"}  # on the progress line


class TrainingLog:
    """Collects each step's metrics. A line is fetched from the device only after the next step was dispatched."""

    def __init__(
        self,
        writer: MetricsWriter,
        status: Status,
        speed: Speed,
        *,
        num_steps: int,
        every_steps: int,
        tokens_per_byte: float,
        detail_every_steps: int = 0,
    ):
        """tokens_per_byte: the training split's, for bits per byte."""
        self._writer, self._status, self._speed = writer, status, speed
        self._num_steps, self._every_steps, self._tokens_per_byte = num_steps, every_steps, tokens_per_byte
        self._detail_every_steps = detail_every_steps
        self._interval: list[dict] = []  # since the last line
        self._waiting: tuple[int, list[dict]] | None = None  # a line that is due: its step, and the metrics
        self._detail: tuple[int, dict] | None = None  # a line of norms that is due

    def add(self, step: int, metrics: dict) -> None:
        """Adds a step that was dispatched, and writes the line that was due before it. metrics: see
        `make_train_step`."""
        self.write_due()
        self._interval.append({name: value for name, value in metrics.items() if name != DETAIL})
        if DETAIL in metrics and step % self._detail_every_steps == 0:
            self._detail = (step, metrics[DETAIL])
        if step % self._every_steps == 0:
            self.end_line(step)

    def end_line(self, step: int) -> None:
        """Makes a line due at `step`, the last one added, whatever the interval."""
        if self._interval:
            self._waiting, self._interval = (step, self._interval), []

    def write_due(self) -> None:
        """Writes the line and the norms that are due, if any, and waits for their step."""
        if self._detail is not None:
            (step, norms), self._detail = self._detail, None
            self._writer.write(step, DETAIL, {name: norm.tolist() for name, norm in jax.device_get(norms).items()})
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        values = means(jax.device_get(metrics)) | self._speed.seen(step)
        values["bits_per_byte"] = bits_per_byte(values["loss"], self._tokens_per_byte)
        values |= peak_memory() | self._status.goodput.shares()
        self._writer.write(step, "train", values)
        self._status.update(step=step, **{name: values[name] for name in STATUS_VALUES if name in values})
        say(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {in_words(values)}")

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leaves the time of the block (an evaluation) out of the speed of the steps around it. Call it once the
        previous step is done."""
        return self._speed.paused()

    def restart(self, step: int) -> None:
        """Call when the run continues from another step: what was collected since the last line is discarded, since its
        steps do not count."""
        self._interval, self._waiting, self._detail = [], None, None
        self._speed.restart(step)
        self._status.goodput.shares()  # the time before is in no line


def peak_memory() -> dict[str, int]:
    """Returns peak_memory_bytes, the most memory that any device of this process has used, if its runtime counts;
    nothing on a CPU, which does not. The devices are not interrupted."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return dict(peak_memory_bytes=max(peaks)) if peaks else {}


def in_words(values: dict) -> str:
    """A line's values, as text for the terminal."""
    mfu = f"MFU {values['mfu']:.1%}  " if "mfu" in values else ""
    memory = f"{values['peak_memory_bytes'] / 2**30:.2f} GiB  " if "peak_memory_bytes" in values else ""
    shares = " ".join(f"{short} {values[LOGGED[kind]]:.0%}" for kind, short in SHORT.items())
    bad = f"  {values['bad_steps']} bad" if values["bad_steps"] else ""
    speed = f"{values['tokens_per_second']:,.0f} tokens/s ({values['tokens_per_second_per_chip']:,.0f} a chip)"
    return (
        f"loss {values['loss']:.4f}  bits/byte {values['bits_per_byte']:.4f}  {speed}  {mfu}{memory}{shares}  "
        f"ETA {hours(values['eta_seconds'])}{bad}"
    )


def means(metrics: Sequence[dict]) -> dict:
    """Means over the steps that were applied, the newest digest, and the number of steps that were not applied."""
    good = [m for m in metrics if not m["n_bad"]]
    found = {
        name: np.mean([m[name] for m in good or metrics], axis=0, dtype=np.float64).tolist()
        for name in metrics[0]
        if name not in ("n_bad", "digest")
    }
    by_unit = {f"{name}_by_unit": value for name, value in found.items() if isinstance(value, list)}
    found |= {name.removesuffix("_by_unit"): float(np.mean(value)) for name, value in by_unit.items()}
    return found | by_unit | dict(bad_steps=len(metrics) - len(good), digest=digest.as_text(metrics[-1]["digest"]))
