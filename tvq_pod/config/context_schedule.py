"""config.train.context_schedule: the longest context of a stream, by step.

    0:1024,500:4096,1000:0    1,024 tokens from step 0 on, 4,096 from step 500 on, no limit from step 1000 on

data/schedule.py says how contexts are cut, and what a run remembers when the setting changes.
"""

import re
from typing import NamedTuple

from tvq_pod.config.settings import TrainSettings
from tvq_pod.errors import UserError

NAME = "config.train.context_schedule"
EXAMPLE = "0:1024,500:4096,1000:0"
_STAGE = re.compile("([0-9]{1,18}):([0-9]{1,18})")


class Stage(NamedTuple):
    """A stretch of steps in which contexts have one length."""

    first_step: int  # steps done before it
    length: int  # the most tokens of a context; 0: no limit


def stages_of(text: str) -> tuple[Stage, ...]:
    """The stages of a schedule; the first begins at step 0. Empty text is one stage without a limit.

    Raises UserError if the text is not a schedule.
    """
    stages: list[Stage] = []
    for part in text.split(",") if text else ["0:0"]:
        if not (found := _STAGE.fullmatch(part.strip())):
            raise UserError(f"{NAME}={text}: {part.strip()!r} is not STEP:LENGTH; give stages like {EXAMPLE}")
        stage = Stage(*map(int, found.groups()))
        if not stages and stage.first_step:
            raise UserError(f"{NAME}={text}: the first stage begins at step {stage.first_step}; let it begin at step 0")
        if stages and stage.first_step <= stages[-1].first_step:
            raise UserError(
                f"{NAME}={text}: a stage at step {stages[-1].first_step} is followed by one at step "
                f"{stage.first_step}; give each stage a later step than the one before"
            )
        stages.append(stage)
    return tuple(stages)


def stage_at(text: str, step: int) -> Stage:
    """The stage of a schedule that holds after `step` steps."""
    return [stage for stage in stages_of(text) if stage.first_step <= step][-1]


def check_context_schedule(train: TrainSettings) -> None:
    """Raises UserError for a stage whose length is not possible or that training would never reach. This is for
    training only: other modes read complete documents, in updates of any length."""
    text, update_len = train.context_schedule, train.update_len
    for stage in stages_of(text):
        if stage.length % update_len:
            below = stage.length // update_len * update_len
            lengths = [str(length) for length in (below, below + update_len) if length]
            raise UserError(
                f"{NAME}={text}: a context of {stage.length} tokens is not a multiple of "
                f"config.train.update_len={update_len}; give {' or '.join(lengths)}, or 0 for no limit"
            )
        if stage.first_step >= train.num_steps:
            raise UserError(
                f"{NAME}={text}: a stage begins at step {stage.first_step}, and training ends at "
                f"config.train.num_steps={train.num_steps}; leave it out, or let it begin earlier"
            )


def in_words(text: str, step: int) -> str:
    """A line that says which stage holds after `step` steps, and when the next one begins; "" if the text is empty."""
    if not text:
        return ""
    following = [stage for stage in stages_of(text) if stage.first_step > step]
    then = f"{_most(following[0])} from step {following[0].first_step} on" if following else "no later stage"
    return f"contexts: {_most(stage_at(text, step))} from step {step} on; {then} ({NAME})"


def _most(stage: Stage) -> str:
    return f"at most {stage.length:,} tokens" if stage.length else "no limit"
