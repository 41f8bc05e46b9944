"""One run's folder, and the lock that keeps a second process out of it."""

import contextlib
import fcntl
import os
import socket

from etils import epath

from tvq_pod.errors import UserError
from tvq_pod.paths import is_bucket
from tvq_pod.progress import say

LOCK_NAME = "lock"


def make_workdir(workdir: epath.Path) -> None:
    """Makes the folder if need be. Raises UserError if it can't be made."""
    with _usable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(workdir: epath.Path):
    """Makes the folder if need be, and holds its lock until the end of the block.

    The kernel drops the lock when the process ends, however it ends, so a lock is never stale. A bucket (gs://) has no
    such lock, and says so. Raises UserError if another process has it, or the folder can't be made.
    """
    if is_bucket(workdir):
        say(f"{workdir} is in a bucket, which can't be locked: see that no other process trains there")
        yield
        return
    made = not workdir.exists()
    make_workdir(workdir)
    with _usable(workdir):
        file = open(workdir / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"--workdir={workdir}: is in use by another process ({holder}); "
                "wait for it, end it, or give another folder"
            ) from None
        except OSError as error:  # some network file systems
            raise UserError(f"--workdir={workdir}: can't be locked ({error.strerror}); give another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        except UserError:  # refused: leave no empty folder behind
            if made and [path.name for path in workdir.iterdir()] == [LOCK_NAME]:
                (workdir / LOCK_NAME).unlink()
                workdir.rmdir()
            raise


@contextlib.contextmanager
def _usable(workdir: epath.Path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: can't be used ({error.strerror}); give a folder that can be written"
        ) from None
