"""Orbax's names of files and threads. It documents none of this; after an upgrade, look here first."""

import threading

from etils import epath

from tvq_pod.host.paths import is_bucket

CHECKED_WITH = {"orbax-checkpoint": "0.12.8"}
COMMITTED = "commit_success.txt"  # in a bucket, the last file of a step: nothing can be renamed there
ADDED_LAST = ("_CHECKPOINT_METADATA", COMMITTED)  # files that orbax adds to a step once all others are written
JSON_FILE = "metadata"  # written by JsonCheckpointHandler in the folder of an item


def is_complete(step: epath.Path) -> bool:
    """Whether the folder of a step is complete. A local folder gets the step's name last."""
    return not is_bucket(step) or (step / COMMITTED).exists()


def uncommit(step: epath.Path) -> None:
    """Makes a step in a bucket count as incomplete, before its files are deleted."""
    (step / COMMITTED).unlink(missing_ok=True)


def drafts(name: str = "*") -> str:
    """A glob pattern for the folders in which steps are written before they get their names: of step `name`, or of
    all."""
    return f"{name}.orbax-checkpoint-tmp*"


def is_writing() -> bool:
    """Whether a thread of orbax is alive in this process."""
    return any(type(thread).__module__.startswith("orbax.") for thread in threading.enumerate())
