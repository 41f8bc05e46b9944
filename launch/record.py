"""What launch knows of a run between two commands: one JSON file a run, on the machine where they are typed.

It says what was asked for, so that a slice that was taken back can be asked for again, and how far the work has come,
so that a command that was killed at any point resumes where it was.
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

# How far the work has come: what a later one needs is there.
ASKED, PREPARED, STARTING, STARTED = "asked", "prepared", "starting", "started"
STOPPED, DONE = "stopped", "done"


class Gone(UserError):
    """The run was deleted meanwhile, by `down`."""


@dataclasses.dataclass
class Record:
    """What is known of one run."""

    # What was asked for.
    name: str
    project: str | None
    zone: str | None
    accelerator: str
    slices: int = 1
    create_flags: list[str] = dataclasses.field(default_factory=list)  # of gcloud, besides name, place and type
    ssh_flags: list[str] = dataclasses.field(default_factory=list)
    spot: bool = False
    label: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))  # by which our slice is known
    source: str = ""  # the tarball's name, without its ending
    install_env_file: str = ""  # what pip finds in its environment there
    # What runs there.
    run_id: str = ""  # new with every `run`
    arguments: list[str] = dataclasses.field(default_factory=list)  # of tvq_pod.main
    workdir: str = ""
    env_file: str = ""
    # How far it has come.
    phase: str = ASKED
    machines: list[int] = dataclasses.field(default_factory=list)  # of each slice, once it is there
    attempt: int = 0  # how often the training was started, on all workers together
    restarts: int = 0  # after a preemption, since a checkpoint was newer than any before
    failures: int = 0  # of the training, since a checkpoint was newer than any before
    saved_step: int = -1  # the newest one known
    refusals: int = 0  # of the request for a slice, since the last that was granted
    asked_at: float = 0.0  # seconds since 1970
    waited: float = 0.0  # seconds from asking to having, the last time


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
        """For whoever has the lock."""
        write_whole(self.path(record.name), json.dumps(dataclasses.asdict(record), indent=1), mode=0o600)

    def change(self, record: Record, changes: dict, again: bool = False) -> None:
        """Changes some fields of what is on disk, which another command may have changed since, and brings `record` up
        to date: whoever wants another phase must look at what it is then. It stays as it is, unless `again`, if the run
        was stopped or is done, or another attempt was begun than `record` knows. Raises Gone."""
        with self._lock(record.name, "change"):
            now = self.load(record.name)
            if now is None:
                raise Gone(f"--name={record.name}: was deleted meanwhile")
            others = (now.run_id, now.attempt) != (record.run_id, record.attempt)
            if (now.phase in (STOPPED, DONE) or others) and not again:
                changes = {name: value for name, value in changes.items() if name not in ("phase", "attempt")}
            for name, value in (dataclasses.asdict(now) | changes).items():
                setattr(record, name, value)
            self._write(record)

    def forget(self, name: str) -> None:
        """Deletes it, and what belongs to it; whoever is about to change it finds it gone."""
        with self._lock(name, "change"):
            self.path(name).unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.name.startswith((f".{name}.", f"{name}.json.")):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Whether this process alone watches the run, for as long as it lasts; the kernel lets go when it dies."""
        with contextlib.ExitStack() as locked:
            try:
                locked.enter_context(self._lock(name, "watch").acquire(blocking=False))
                alone = True
            except filelock.Timeout:
                alone = False
            yield alone

    def _lock(self, name: str, what: str) -> filelock.BaseFileLock:
        """A lock between processes of this machine, to be entered. The kernel's own or an error: the package's
        replacement for file systems without one would outlive a process that is killed."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return filelock.FileLock(self.folder / f".{name}.{what}", fallback_to_soft=False)
