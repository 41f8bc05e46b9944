"""The clock, passed as an argument so that a test over an hour does not take an hour."""

import time


class Clock:
    """The real time."""

    def now(self) -> float:
        """Returns the seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)


def ago(seconds: float) -> str:
    """Formats a duration: 42 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
