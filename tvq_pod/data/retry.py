"""Sources that are out of reach for a while: what fails is tried again, less and less often, and then named."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say

RETRY_SECONDS = 300.0  # from the first failure; the libraries below have tried several times before each
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries

T = TypeVar("T")


def retried(source: str, call: Callable[[], T], may_pass: Callable[[Exception], bool], remedy: str) -> T:
    """What call() returns.

    source: what is read, for the message. may_pass: whether an error may pass, so that it is worth another try.
    remedy: of one that can't. Raises FileNotFoundError as call() does. Raises UserError for any other error, at once or
    after RETRY_SECONDS.
    """
    from tvq_pod.parallel.deadlines import still_working  # imports jax, which workers that write parts do without

    began, pause = None, FIRST_PAUSE
    while True:
        try:
            return call()
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # of the network, of the service, of credentials that are refreshed
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
                    "again when it can be, and what has been prepared is kept"
                ) from None
        time.sleep(pause * random.uniform(0.5, 1.0))
        still_working()
        pause = min(2 * pause, LONGEST_PAUSE)
