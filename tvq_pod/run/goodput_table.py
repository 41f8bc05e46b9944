"""A table of where the time of a run went; see goodput.py. launch.pod prints it too, so it needs no package.

steps        trains steps that the run had not reached before
repeated     trains steps again whose result was lost with an earlier session, or in a rollback
data         the devices are idle, because the next batch has not been read yet
saves        a checkpoint is copied to the host, or training waits for one; it is written beside the steps
evaluation   evaluates the validation split
compile      compiles the training step
restore      verifies and reads checkpoints, or makes the first state
start        opens the corpus and the logs
profile      starts a trace, or writes it
end          samples after the last step, and closes
waiting      no session runs: the run waits for a slice, or to be started
"""

import dataclasses
from typing import Any

from tvq_pod.run.progress import hours

STEPS, REPEATED, DATA, SAVES, EVALUATION = "steps", "repeated", "data", "saves", "evaluation"
COMPILE, RESTORE, START, PROFILE, END, WAITING = "compile", "restore", "start", "profile", "end", "waiting"
KINDS = {  # in words, for the table
    STEPS: "steps",
    REPEATED: "steps done twice",
    DATA: "waiting for data",
    SAVES: "saves",
    EVALUATION: "evaluation",
    COMPILE: "compile",
    RESTORE: "restore",
    START: "start",
    PROFILE: "profile",
    END: "end",
    WAITING: "waiting to be started",
}


@dataclasses.dataclass(frozen=True)
class _Row:
    words: str
    seconds: float
    share: float


def table(record: dict[str, Any]) -> str:
    """Formats what `Goodput.record` returns: a line for each kind that took time, `steps` first, then the longest
    first. The record may come from another version, which has other kinds. Raises KeyError, TypeError, ValueError or
    AttributeError for anything that is not a record."""
    seconds = {kind: float(record["seconds"].get(kind, 0.0)) for kind in KINDS}
    wall = max(sum(seconds.values()), 1e-9)
    rows = [_Row(KINDS[kind], seconds[kind], seconds[kind] / wall) for kind in KINDS]
    rows = rows[:1] + sorted((row for row in rows[1:] if row.seconds >= 0.05), key=lambda row: -row.seconds)
    width = max(len(row.words) for row in rows)
    starts = f"{record['starts']} start" + "s" * (record["starts"] > 1)
    return "\n".join(
        [
            f"goodput {record['goodput']:.1%}: of {hours(wall)} since the first start, {starts}",
            *(f"  {row.words:<{width}}  {hours(row.seconds):>9}  {row.share:6.1%}" for row in rows),
        ]
    )
