"""The record of a run between two commands: one JSON file per run, on the machine where the commands are typed.

It has the request, so that a slice that was taken back can be requested again, and the progress, so that a command that
was killed at any point resumes where it was.
"""

import contextlib
import dataclasses
import json
import pathlib
import secrets
from collections.abc import Iterator

import filelock

from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole

# The phases of the work, in order: each includes the earlier ones.
ASKED, PREPARED, STARTING, STARTED = "asked", "prepared", "starting", "started"
STOPPED, DONE = "stopped", "done"


class Gone(UserError):
    """The run was deleted in the meantime, by `down`."""


@dataclasses.dataclass
class Record:
    """The record of one run."""

    # The request.
    name: str
    project: str | None
    zone: str | None
    accelerator: str
    slices: int = 1
    create_flags: list[str] = dataclasses.field(default_factory=list)  # for gcloud, besides name, place and type
    ssh_flags: list[str] = dataclasses.field(default_factory=list)
    spot: bool = False
    label: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))  # identifies our slice
    source: str = ""  # the tarball's name, without its ending
    install_env_file: str = ""  # variables for pip on the machines
    # The training.
    run_id: str = ""  # new with every `run`
    arguments: list[str] = dataclasses.field(default_factory=list)  # for tvq_pod.main
    workdir: str = ""
    env_file: str = ""
    # The progress.
    phase: str = ASKED
    machines: list[int] = dataclasses.field(default_factory=list)  # the number in each slice, once it exists
    attempt: int = 0  # how often the training was started on all workers
    restarts: int = 0  # after preemptions, since the last newer checkpoint
    failures: int = 0  # of the training, since the last newer checkpoint
    saved_step: int = -1  # the newest known one
    refusals: int = 0  # of requests for a slice, since the last granted one
    asked_at: float = 0.0  # seconds since 1970
    waited: float = 0.0  # seconds from the last request to the slice


class Records:
    """A folder of records."""

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder).expanduser()

    def path(self, name: str) -> pathlib.Path:
        """Returns the path of a run's record."""
        return self.folder / f"{name}.json"

    def names(self) -> list[str]:
        """Returns the names of all runs."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def load(self, name: str) -> Record | None:
        """Returns the record, or None if it does not exist. Raises UserError if it cannot be read."""
        path = self.path(name)
        try:
            return Record(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"--name={name}: {path} cannot be read ({error}); delete it to forget the run") from None

    def get(self, name: str) -> Record:
        """Returns the record. Raises UserError if it does not exist."""
        record = self.load(name)
        if record is None:
            known = ", ".join(self.names()) or "none"
            raise UserError(f"--name={name}: does not exist in {self.folder} (which has: {known}); run `up` first")
        return record

    def save(self, record: Record) -> None:
        """Writes the record: a reader finds the old one or the new one, never a part. Only its owner may read it."""
        with self._lock(record.name, "change"):
            self._write(record)

    def _write(self, record: Record) -> None:
        """Writes the record. The caller must hold the lock."""
        write_whole(self.path(record.name), json.dumps(dataclasses.asdict(record), indent=1), mode=0o600)

    def change(self, record: Record, changes: dict, again: bool = False) -> None:
        """Changes some fields of the record on disk, which another command may have changed, and updates `record` from
        it, so that the caller can check the actual phase. Unless `again`, nothing changes if the run was stopped or is
        done, or if an attempt has begun that `record` does not know. Raises Gone."""
        with self._lock(record.name, "change"):
            now = self.load(record.name)
            if now is None:
                raise Gone(f"--name={record.name}: was deleted in the meantime")
            others = (now.run_id, now.attempt) != (record.run_id, record.attempt)
            if (now.phase in (STOPPED, DONE) or others) and not again:
                changes = {name: value for name, value in changes.items() if name not in ("phase", "attempt")}
            for name, value in (dataclasses.asdict(now) | changes).items():
                setattr(record, name, value)
            self._write(record)

    def forget(self, name: str) -> None:
        """Deletes the record and its other files; another command that is about to change it finds it gone."""
        with self._lock(name, "change"):
            self.path(name).unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.name.startswith((f".{name}.", f"{name}.json.")):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Yields whether this process is the only one that watches the run; the kernel releases the lock if it dies."""
        with contextlib.ExitStack() as locked:
            try:
                locked.enter_context(self._lock(name, "watch").acquire(blocking=False))
                alone = True
            except filelock.Timeout:
                alone = False
            yield alone

    def _lock(self, name: str, what: str) -> filelock.BaseFileLock:
        """A lock between processes of this machine, as a context manager. It is the kernel's or an error: the package's
        replacement for file systems without locks would outlive a killed process."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return filelock.FileLock(self.folder / f".{name}.{what}", fallback_to_soft=False)
