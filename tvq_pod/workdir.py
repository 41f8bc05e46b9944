"""One run's folder, and the lock that keeps a second run out of it, on this host or another.

The lock is a file, WORKDIR/lock: who holds it, and a number that its holder counts up while it lives. On one host the
kernel's own lock on that file (flock) decides: it is dropped when its process ends, however it ends. Between hosts, and
in a bucket, where there is no such thing, a holder whose number has stood still for LEASE_SECONDS is dead.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from tvq_pod.errors import UserError
from tvq_pod.paths import is_bucket
from tvq_pod.progress import say

LOCK_NAME = "lock"
BEAT_SECONDS = 10.0  # between signs of life
LEASE_SECONDS = 60.0  # without one, a holder is dead
RECORD_BYTES = 512  # of the lock
SETTLE_SECONDS = 2.0  # after which two that took the lock of a bucket at once see which of them has it


def make_workdir(workdir: epath.Path) -> None:
    """Makes the folder if need be. Raises UserError if it can't be made."""
    with _usable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder if need be, and holds its lock until the end of the block.

    A lock whose holder is dead is taken over, and said so. Should another run take ours over, which it does only if we
    gave no sign of life for long, this process ends. Raises UserError if another run has it, or the folder can't be
    made.
    """
    made = not workdir.exists()
    make_workdir(workdir)
    path = workdir / LOCK_NAME
    with contextlib.ExitStack() as opened:
        if not is_bucket(workdir):
            _flock(workdir, opened)
        before = _read(path)
        if before and not _is_dead(path, before, flocked=not is_bucket(workdir)):
            raise _in_use(workdir, before)
        own = dict(host=_host(), hostname=socket.gethostname(), process=os.getpid(), token=secrets.token_hex(8))
        with _usable(workdir):
            _write(path, own | dict(beat=0))
        if is_bucket(workdir):
            time.sleep(SETTLE_SECONDS)
            if (now := _read(path)).get("token") != own["token"]:
                raise _in_use(workdir, now)
        if before:
            say(f"takes over the lock {path} from {_who(before)}, which is dead")
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(path, own, ended), daemon=True)
        beating.start()
        try:
            yield
        except UserError:  # refused: leave no empty folder behind
            if made and not is_bucket(workdir) and [path.name for path in workdir.iterdir()] == [LOCK_NAME]:
                ended.set()
                beating.join()
                path.unlink()
                workdir.rmdir()
            raise
        finally:
            ended.set()
            beating.join()
            if path.exists():
                with contextlib.suppress(OSError):
                    _write(path, {})


def _flock(workdir: epath.Path, opened: contextlib.ExitStack) -> None:
    path = workdir / LOCK_NAME
    with _usable(workdir):
        file = opened.enter_context(open(path, "a", encoding="utf-8"))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(workdir, _read(path)) from None
    except OSError as error:  # some network file systems
        raise UserError(f"--workdir={workdir}: can't be locked ({error.strerror}); give another folder") from None


def _is_dead(path: epath.Path, holder: dict, flocked: bool) -> bool:
    """Whether a holder that did not say goodbye is dead; waits for as long as that is not certain."""
    if flocked and holder.get("host") == _host():
        return True  # the kernel gave us its lock
    while True:
        age = _age(path)
        if age > LEASE_SECONDS:
            return _read(path) == holder
        say(f"{path} is held by {_who(holder)}, last heard of {age:.0f} s ago: waits to see whether it lives")
        time.sleep(max(1.0, min(BEAT_SECONDS, LEASE_SECONDS - age + 1.0)))
        if _read(path) != holder:
            return False


def _age(path: epath.Path) -> float:
    """Seconds since the file was written, by the clock of where it lies: hosts' clocks may differ."""
    probe = path.with_name(f"{path.name}.probe-{secrets.token_hex(4)}")
    probe.write_text("now")
    now = probe.stat().mtime
    probe.unlink()
    return now - path.stat().mtime


def _beat(path: epath.Path, own: dict, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        try:
            now = _read(path)
            if now and now.get("token") != own["token"]:
                print(f"error: the lock {path} was taken over by {_who(now)}; ends", file=sys.stderr, flush=True)
                os._exit(1)
            _write(path, own | dict(beat=beat))
        except OSError:  # the network, or a full disk: the next beat may come through
            continue


def _write(path: epath.Path, holder: dict) -> None:
    """In place and at once, so that no reader finds an empty file: the kernel's lock is on this very file."""
    text = (json.dumps(holder) if holder else "").ljust(RECORD_BYTES)
    if is_bucket(path):
        path.write_text(text)
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, text.encode(), 0)
    finally:
        os.close(file)


def _read(path: epath.Path) -> dict:
    """The holder as the file has it; empty if nobody holds it, or it is cut off."""
    try:
        holder = json.loads(path.read_text().strip() or "{}")
    except (FileNotFoundError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _host() -> str:
    """This machine, as long as it runs."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _who(holder: dict) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('hostname', '?')}"


def _in_use(workdir: epath.Path, holder: dict) -> UserError:
    return UserError(
        f"--workdir={workdir}: is in use by another process ({_who(holder)}); "
        "wait for it, end it, or give another folder"
    )


@contextlib.contextmanager
def _usable(workdir: epath.Path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: can't be used ({error.strerror}); give a folder that can be written"
        ) from None
