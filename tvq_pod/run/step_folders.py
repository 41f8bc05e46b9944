"""The folder of a run's checkpoints: which steps exist, and how one is set aside or removed.

WORKDIR/checkpoints/STEP                 appears under its name only when it is complete
WORKDIR/checkpoints/STEP.damaged         a step whose files do not match its manifest: set aside, never deleted
WORKDIR/checkpoints/STEP.undone          a step that the run went back from (see rollback.py, step_back.py)
"""

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterator

from etils import epath

from tvq_pod.config.settings import CheckpointSettings
from tvq_pod.host.files import free_name
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import tell
from tvq_pod.run import orbax_files


def newest_record(workdir: epath.Path) -> tuple[epath.Path, dict] | None:
    """The newest step's folder and its record, for early checks: only the record's file is read, and it is not
    verified. None if there is no step, or its record can't be read."""
    path = epath.Path(workdir) / "checkpoints"
    with contextlib.suppress(OSError, ValueError):
        newest = path / str(max(StepFolders(path).steps()))
        return newest, json.loads((newest / "record" / orbax_files.JSON_FILE).read_text())
    return None


def stale_steps(steps: list[int], settings: CheckpointSettings, losses: dict[int, float]) -> list[int]:
    """The steps that need not be kept. losses: the validation losses of steps that were evaluated."""
    if not settings.keep:
        return []
    kept = set(sorted(steps)[-settings.keep :])
    if settings.keep_every_steps:
        kept |= {step for step in steps if step % settings.keep_every_steps == 0}
    evaluated = sorted((step for step in steps if step in losses), key=lambda step: losses[step])
    kept |= set(evaluated[: settings.keep_best])
    return [step for step in sorted(steps) if step not in kept]


class StepFolders:
    """The steps in one folder of checkpoints."""

    def __init__(self, path: epath.Path):
        self.path = path

    def steps(self) -> list[int]:
        """Complete steps, in order."""
        if not self.path.is_dir():
            return []
        named = [step for step in self.path.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", step.name)]
        return sorted(int(step.name) for step in named if orbax_files.is_complete(step))

    def entries(self, pattern: str) -> Iterator[epath.Path]:
        """The entries of the folder whose names match a pattern. (epath's glob would treat `[` in the folder's own path
        as a pattern.)"""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return (self.path / name for name in names if fnmatch.fnmatchcase(name, pattern))

    def aside(self) -> list[str]:
        """The names of the steps that were set aside, sorted by step and then by name."""
        names = [path.name for path in self.entries("*.undone*")] + [path.name for path in self.entries("*.damaged*")]
        return sorted(names, key=lambda name: (int(step) if (step := name.partition(".")[0]).isdecimal() else -1, name))

    def set_aside(self, step: int, why: str) -> None:
        """Renames a step to STEP.why, and prints a line about it."""
        target = free_name(self.path / f"{step}.{why}")
        (self.path / str(step)).rename(target)
        tell(f"{why.upper()}: checkpoint {self.path / str(step)} is set aside as {target.name}")

    def delete(self, step: int) -> None:
        """Deletes a step, and renames it first: a kill in between does not leave half of a step behind."""
        doomed = self.path / f"{step}.deleting"
        if not is_bucket(self.path):
            (self.path / str(step)).rename(doomed)
            doomed.rmtree(missing_ok=True)
        else:
            orbax_files.uncommit(self.path / str(step))
            (self.path / str(step)).rmtree(missing_ok=True)

    def tidy(self) -> None:
        """Removes what a killed or failed save or deletion left behind."""
        for pattern in (orbax_files.drafts(), "*.deleting"):
            for path in self.entries(pattern):
                with contextlib.suppress(OSError):  # a thread of the failed save may still write there
                    path.rmtree(missing_ok=True)
