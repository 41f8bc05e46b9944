"""config.data.mixture_schedule: other weights of a mixture from given steps on.

    1000:0.5/0.5,2000:0/1      with config.data.mixture=A=0.9,B=0.1: these until step 1000, then half each, then only B

Weights are in the order of the mixture's stores; 0 leaves a store out. data/run_streams.py says how streams change.
"""

import re
from typing import NamedTuple

from tvq_pod.config.settings import DataSettings, TrainSettings
from tvq_pod.errors import UserError

NAME = "config.data.mixture_schedule"
EXAMPLE = "1000:0.5/0.5,2000:0/1"
MAX_WEIGHT = 1e6


class Weights(NamedTuple):
    """The weights of a mixture's stores from a step on; they add up to 1."""

    first_step: int  # steps done before it
    weights: tuple[float, ...]


def weights_of(text: str, n_stores: int) -> tuple[Weights, ...]:
    """The weight changes of a schedule, in order; none if the text is empty.

    Raises UserError if it is not a schedule for `n_stores` stores.
    """
    changes: list[Weights] = []
    for part in text.split(",") if text else ():
        here = f"{NAME}={text}: {part.strip() or 'nothing'}"
        step, colon, weights = part.strip().partition(":")
        if not colon or not re.fullmatch("[0-9]{1,18}", step):
            raise UserError(f"{here} is not STEP:WEIGHT/WEIGHT; give changes like {EXAMPLE}")
        numbers = [_number(weight) for weight in weights.split("/")]
        if len(numbers) != n_stores:
            raise UserError(f"{here} has {len(numbers)} weights, but config.data.mixture has {n_stores} stores")
        if not all(0 <= number <= MAX_WEIGHT for number in numbers) or not any(numbers):
            raise UserError(f"{here} must have weights from 0 to {MAX_WEIGHT:g}, at least one of them above 0")
        least = changes[-1].first_step + 1 if changes else 1
        if int(step) < least:
            raise UserError(f"{here} must come at step {least} or later, after the previous change")
        changes.append(Weights(int(step), tuple(number / sum(numbers) for number in numbers)))
    return tuple(changes)


def check_mixture_schedule(data: DataSettings, train: TrainSettings) -> None:
    """Raises UserError for a change that training would never reach."""
    for change in weights_of(data.mixture_schedule, n_stores(data)):
        if change.first_step >= train.num_steps:
            raise UserError(
                f"{NAME}={data.mixture_schedule}: a change comes at step {change.first_step}, and training ends at "
                f"config.train.num_steps={train.num_steps}; leave it out, or let it come earlier"
            )


def n_stores(data: DataSettings) -> int:
    """The number of stores in config.data.mixture."""
    return len(data.mixture.split(",")) if data.mixture else 0


def in_words(data: DataSettings, step: int) -> str:
    """A line that says when the weights change after `step`; "" if they don't."""
    changes = [change for change in weights_of(data.mixture_schedule, n_stores(data)) if change.first_step > step]
    if not changes:
        return ""
    told = [f"{'/'.join(f'{weight:.3g}' for weight in c.weights)} from step {c.first_step} on" for c in changes]
    return f"mixture: weights {', '.join(told)} ({NAME})"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0
