"""Where the time of a run went, as a table; see goodput.py. launch.pod prints it too, so it needs no package.

steps        trains steps that the run had not come to before
repeated     trains steps again, of which a session before, or a rollback, has lost the result
data         the devices have nothing to do, because the next batch is not read yet
saves        a checkpoint is copied to the host, or training waits for one; it is written beside the steps
evaluation   evaluates the validation split
compile      compiles the step
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
    """What `Goodput.record` returns, as a person reads it: a line for each kind that took time, the longest first but
    for `steps`. The record may be of another version, which has other kinds. Raises KeyError, TypeError, ValueError or
    AttributeError for what is not a record."""
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
