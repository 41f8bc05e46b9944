"""The settings that a start of a run changes from the last one: printed on every start, kept in
WORKDIR/config_history.jsonl.

    {"step": 2000, "time": 1764150000.0, "changed": {"config.train.num_steps": [2000, 4000]}}    old, new

A run that went back on purpose has a line of another kind; see step_back.py.

The settings of the last start are in the run's config.json, which is written together with the history.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable

from etils import epath

from tvq_pod.config.names import with_current_names
from tvq_pod.config.resolve import default_config
from tvq_pod.config.run_config import to_json
from tvq_pod.config.settings import OptimizerSettings, Settings
from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole
from tvq_pod.host.terminal import say

NAME = "config_history.jsonl"
JUMP = 1.5  # a learning rate that changes by more than this factor, up or down, gets a warning
NO_SETTING = "(no such setting)"
Rate = Callable[[OptimizerSettings, int, int], float]  # (settings, num_steps, step) -> the learning rate of that step
# The settings that determine the learning rate of a step.
OF_SCHEDULE = (
    *(f"config.optimizer.{name}" for name in ("learning_rate", "schedule", "schedule_steps", "warmup_steps")),
    *(f"config.optimizer.{name}" for name in ("decay_steps", "final_fraction")),
    "config.train.num_steps",
)


def last_start(workdir: epath.Path) -> dict | None:
    """The settings of the run's last start, {setting's name: value}; None if there was none, or config.json can't be
    read. Settings that its version did not know have their defaults."""
    try:
        tree = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(tree, dict):
        return None
    return dict(_leaves(default_config().to_dict())) | dict(_leaves(with_current_names(tree)))


def changes(before: dict | None, settings: Settings) -> dict[str, list]:
    """The settings that differ: {setting's name: [old value, new value]}."""
    if before is None:
        return {}
    now = dict(_leaves(json.loads(to_json(settings))))
    names = [*now, *(name for name in before if name not in now)]
    pairs = {name: [before.get(name, NO_SETTING), now.get(name, NO_SETTING)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def tell(workdir: epath.Path, settings: Settings, step: int, rate: Rate) -> None:
    """Prints what has changed since the last start, a line for each setting, and warns if the learning rate jumps.

    step: the step that the run resumes from; 0: it begins. rate: see training/optimizer.py.
    """
    before = last_start(workdir)
    if before is None and (workdir / "config.json").exists():
        say(f"WARNING: {workdir / 'config.json'} can't be read, so the changes since the last start are unknown")
    changed = changes(before, settings)
    for name, (old, new) in changed.items():
        say(f"{name}={new}: was {old} at the last start")
    resumes = 0 < step < settings.train.num_steps
    if before is None or not resumes or not any(name in changed for name in OF_SCHEDULE):
        return
    if warning := jump(before, settings, step, rate):
        say(f"WARNING: {warning}")


def keep(workdir: epath.Path, settings: Settings, step: int) -> None:
    """Writes config.json, and before it a line of the history, with what differs from the existing config.json.

    Raises UserError if they can't be written.
    """
    try:
        if changed := changes(last_start(workdir), settings):
            add(workdir, step, changed)
        write_whole(workdir / "config.json", to_json(settings))
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: config.json can't be written ({error.strerror or error}); "
            "make room, or give a folder that can be written"
        ) from None


def add(workdir: epath.Path, step: int, changed: dict[str, list], **more) -> None:
    """Adds a line to the history. more: further fields of the line; see step_back.py."""
    path = workdir / NAME
    text = path.read_text() if path.exists() else ""
    line = json.dumps(dict(step=step, time=time.time(), changed=changed, **more)) + "\n"
    write_whole(path, text[: text.rfind("\n") + 1] + line)


def lines(workdir: epath.Path) -> list[dict]:
    """The lines of the history, in order, without those that can't be read."""
    found, path = [], workdir / NAME
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                found.append(line)
    return found


def jump(before: dict, settings: Settings, step: int, rate: Rate) -> str:
    """A warning that the learning rate of the update after `step` differs from that under the previous settings, with
    the settings that would keep it; "" if the factor between them is at most JUMP."""
    try:
        prefix = "config.optimizer."
        names = {field.name for field in dataclasses.fields(OptimizerSettings)}
        optimizer = {name.removeprefix(prefix): value for name, value in before.items() if name.startswith(prefix)}
        then = OptimizerSettings(**{name: value for name, value in optimizer.items() if name in names})
        old = rate(then, before["config.train.num_steps"], step)
    except (KeyError, TypeError, ValueError):  # from a version with other settings
        return ""
    new = rate(settings.optimizer, settings.train.num_steps, step)
    share = new / settings.optimizer.learning_rate if settings.optimizer.learning_rate else 0.0
    if max(old, new) <= JUMP * min(old, new):
        return ""
    by = f", {new / old:.3g} times as much" if old and math.isfinite(new / old) else ""
    remedies = []
    if old and share:
        remedies.append(f"--config.optimizer.learning_rate={old / share:.3g} to keep the rate")
    back = {name: old for name, (old, _) in changes(before, settings).items() if name in OF_SCHEDULE}
    if back.get("config.train.num_steps", step + 1) > step:  # else the run had ended under the old settings
        remedies.append(" ".join(f"--{name}={value}" for name, value in back.items()) + " to keep the schedule")
    if then.schedule == "wsd" and 0 < (begins := then.decay_begins(before["config.train.num_steps"])) < step:
        remedies.append(f"a start from step {begins} or before, where the decay began")
    return (
        f"config.optimizer.learning_rate={settings.optimizer.learning_rate}: the learning rate jumps at step {step} "
        f"from {old:.3g} to {new:.3g}{by}; give {', or '.join(remedies) or 'another schedule'}"
    )


def _leaves(tree: dict, prefix: str = "config"):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value
