"""The progress of a run on the terminal: one line per log, with speed and time left."""

import contextlib
import time
from collections.abc import Callable, Iterator


def hours(seconds: float) -> str:
    """Formats a duration as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Speed:
    """Tokens per second and time left, from the times at which steps were found done."""

    def __init__(
        self,
        first_step: int,
        num_steps: int,
        tokens_per_step: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        chips: float = 1.0,
        seconds_at_peak: float | None = None,
    ):
        """chips: how many share the tokens. seconds_at_peak: the time that a step takes at the chips' peak, for MFU;
        None: it is unknown."""
        self._clock, self._tokens_per_step, self._num_steps = clock, tokens_per_step, num_steps
        self._chips, self._seconds_at_peak = chips, seconds_at_peak
        self._begin = self._latest = (first_step, clock())

    def seen(self, step: int) -> dict:
        """Call when `step` is done. Returns tokens_per_second, tokens_per_second_per_chip and, if the chips' peak is
        known, mfu, 0 .. 1, since the previous call; and eta_seconds from the average over the session, evaluations and
        saves included."""
        now = (step, self._clock())
        latest = _rate(self._latest, now)
        tokens_per_second = self._tokens_per_step * latest
        steps_per_second = _rate(self._begin, now)
        self._latest = now
        mfu = {} if self._seconds_at_peak is None else dict(mfu=self._seconds_at_peak * latest)
        return dict(
            tokens_per_second=tokens_per_second,
            tokens_per_second_per_chip=tokens_per_second / self._chips,
            **mfu,
            eta_seconds=(self._num_steps - step) / steps_per_second if steps_per_second else 0.0,
        )

    def restart(self, step: int) -> None:
        """Call when the run continues from another step than the last one seen."""
        self._begin = self._latest = (step, self._clock())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block (an evaluation) out of the speed of the steps around it."""
        began = self._clock()
        yield
        step, at = self._latest
        self._latest = (step, at + self._clock() - began)


def _rate(begin: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[0] - begin[0]) / max(end[1] - begin[1], 1e-9)
