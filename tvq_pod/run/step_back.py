"""--mode=train --step=N: a run goes back to an older checkpoint on purpose.

Newer checkpoints are set aside as STEP.undone, never deleted, and config_history.jsonl gets a line:

    {"step": 20, "time": 1764150000.0, "changed": {}, "set_aside": [30, 40], "run_id": "..."}

They are set aside once the run can no longer be refused, the newest first, and the line is written last. So a run that
is killed in between has lost nothing: the same command finishes the job, and a start without --step resumes from the
newest remaining step.

A launch of launch.pod repeats its command after a preemption. If the history has a line with its run_id
(TVQ_POD_RUN_ID), it has gone back already, and it resumes from the newest checkpoint, as without --step.
"""

import os

from etils import epath

from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.parallel.processes import decided_by_process_zero, from_process_zero, on_process_zero
from tvq_pod.run import config_history
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.step_folders import StepFolders


def asked_step(workdir: epath.Path, step: int | None) -> int | None:
    """The step that this start goes back to; None: it resumes from the newest. Reads only file names and the history.

    step: the value of --step; that of process 0 counts. Raises UserError if the run does not have this step.
    """
    asked = from_process_zero(-1 if step is None else step)
    if asked == -1:
        return None
    if decided_by_process_zero(_went_back_there(workdir, asked)):
        say(f"--step={asked}: this launch has already gone back to it; resuming from the newest checkpoint")
        return None
    folders = StepFolders(workdir / "checkpoints")
    steps = folders.steps()
    if not steps:
        raise UserError(f"--step={asked}: {workdir} has no checkpoint to go back to; leave --step out")
    if asked not in steps:
        aside = [name for name in folders.aside() if name.startswith(f"{asked}.undone")]
        hint = f"; to bring one back that was set aside, rename {' or '.join(aside)} to {asked}" if aside else ""
        raise UserError(f"--step={asked}: has no such checkpoint; give one of {', '.join(map(str, steps))}{hint}")
    return asked


def pick(checkpoints: Checkpoints, step: int | None) -> int | None:
    """The step to resume from, whose files match its manifest: `step`, or for None the newest good one; None if nothing
    was ever saved. Raises UserError if `step` is damaged."""
    return checkpoints.newest_good() if step is None else checkpoints.pick(step)


def set_aside_after(workdir: epath.Path, checkpoints: Checkpoints, step: int) -> None:
    """Sets aside all checkpoints after `step`, and records that. Raises UserError if the record can't be written."""
    newer = [newer for newer in checkpoints.steps() if newer > step]
    checkpoints.undo(after=step)

    def record() -> None:
        try:
            config_history.add(workdir, step, {}, set_aside=newer, run_id=_run_id())
        except OSError as error:
            raise UserError(
                f"--step={step}: {workdir / config_history.NAME} can't be written ({error.strerror or error}); make "
                "room, and start again"
            ) from None

    if decided_by_process_zero(bool(newer or _run_id())):
        on_process_zero(record)
    say(f"--step={step}: {len(newer)} newer checkpoint(s) set aside; leave --step out of the next start")


def _went_back_there(workdir: epath.Path, step: int) -> bool:
    """Whether this launch already went back to the step in an earlier start."""
    known = [(line["step"], line["run_id"]) for line in config_history.lines(workdir) if "run_id" in line]
    return bool(_run_id()) and (step, _run_id()) in known


def _run_id() -> str:
    return os.environ.get("TVQ_POD_RUN_ID", "")
