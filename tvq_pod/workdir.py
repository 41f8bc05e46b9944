"""One run's folder, and the lock that keeps a second process out of it."""

import contextlib
import fcntl
import os
import pathlib
import socket

from tvq_pod.errors import UserError

LOCK_NAME = "lock"


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
    """Makes the folder if need be, and holds its lock until the end of the block.

    The kernel drops the lock when the process ends, however it ends, so a lock is never stale. Raises UserError if
    another process has it, or the folder can't be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: can't be used ({error.strerror}); give a folder that can be written"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"--workdir={workdir}: is in use by another process ({holder}); "
                "wait for it, end it, or give another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
