"""Retrying sources that are temporarily out of reach, with growing pauses, before an error that names them."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say

RETRY_SECONDS = 300.0  # after the first failure; the libraries below retry several times themselves
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries

T = TypeVar("T")


def retried(source: str, call: Callable[[], T], may_pass: Callable[[Exception], bool], remedy: str) -> T:
    """Returns call(), which is tried again after errors that may pass.

    source: what is read, for the message. may_pass: whether an error may be temporary and is worth another try.
    remedy: for an error that is not. Raises FileNotFoundError as call() does. Raises UserError for any other error, at
    once or after RETRY_SECONDS.
    """
    from tvq_pod.parallel.deadlines import still_working  # imports jax, which the workers that write parts don't need

    began, pause = None, FIRST_PAUSE
    while True:
        try:
            return call()
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # from the network, the service, or refreshing credentials
            why = " ".join(str(error).split())[:200] or type(error).__name__
            if not may_pass(error):
                raise UserError(f"config.data.source={source}: can't be read ({why}); {remedy}") from None
            if began is None:
                began = time.monotonic()
                say(f"WARNING: {source} can't be read ({why}): trying again")
            seconds = time.monotonic() - began
            if seconds >= RETRY_SECONDS:
                raise UserError(
                    f"config.data.source={source}: can't be read after {seconds:.0f} seconds of trying ({why}); start "
                    "again when it can be; what has been prepared is kept"
                ) from None
        time.sleep(pause * random.uniform(0.5, 1.0))
        still_working()
        pause = min(2 * pause, LONGEST_PAUSE)
