"""One run's folder, and the lock that keeps a second run out of it, on this host or another.

The lock is a file, WORKDIR/lock: who holds it, and a number that its holder counts up while it lives. On one host the
kernel's own lock on that file (flock) decides: it is released when its process ends, however it ends. Between hosts,
and in a bucket, a holder whose number has not changed for LEASE_SECONDS is dead. In a bucket each write names the
version that it replaces, so if two processes try to take the lock at once, one is refused.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Iterator

import tensorstore
from etils import epath
from filelock import lock_descriptor

from tvq_pod.data.store import kvstore
from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say, tell

LOCK_NAME = "lock"
BEAT_SECONDS = 10.0  # between signs of life
LEASE_SECONDS = 60.0  # without a sign of life for this long, a holder is dead
RECORD_BYTES = 512  # size of the lock file


def make_workdir(workdir: epath.Path) -> None:
    """Makes the folder if it does not exist. Raises UserError if it can't be made."""
    with _usable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder if it does not exist, and holds its lock until the end of the block.

    A lock whose holder is dead is taken over, with a message. If another run takes over our lock, which happens only
    after we gave no sign of life for too long, this process ends. Raises UserError if another run holds the lock, or
    the folder can't be made.
    """
    made = not workdir.exists()
    make_workdir(workdir)
    with contextlib.ExitStack() as opened:
        lock = _BucketLock(workdir) if is_bucket(workdir) else _FileLock(workdir, opened)
        before = lock.read()
        if before and not _is_dead(lock, before):
            raise _in_use(workdir, before)
        takes_over = before and not lock.is_free_of(before)
        own = dict(host=_host(), hostname=socket.gethostname(), process=os.getpid(), token=secrets.token_hex(8))
        with _usable(workdir):
            if not lock.write(own | dict(beat=0)):
                raise _in_use(workdir, lock.read())
        if takes_over:  # another host may do so, too: the last one to write has it
            time.sleep(BEAT_SECONDS / 5)
            if (now := lock.read()).get("token") != own["token"]:
                raise _in_use(workdir, now)
        if before:
            say(f"taking over the lock {workdir / LOCK_NAME} from {_who(before)}, which is dead")
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(lock, own, ended), daemon=True)
        beating.start()
        try:
            yield
        except UserError:  # refused: leave no empty folder behind
            if made and not is_bucket(workdir) and [path.name for path in workdir.iterdir()] == [LOCK_NAME]:
                ended.set()
                beating.join()
                (workdir / LOCK_NAME).unlink()
                workdir.rmdir()
            raise
        finally:
            ended.set()
            beating.join()
            with contextlib.suppress(OSError, ValueError):
                if lock.read().get("token") == own["token"]:
                    lock.write({})


class _FileLock:
    """The record in a local folder, which may be on a network file system; holds the kernel's lock on it."""

    def __init__(self, workdir: epath.Path, opened: contextlib.ExitStack):
        """Raises UserError if a process of this host holds the lock."""
        self.path = workdir / LOCK_NAME
        with _usable(workdir):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        opened.callback(os.close, self._file)
        try:
            is_ours = lock_descriptor(self._file, blocking=False)
        except OSError as error:  # some network file systems have no locks
            raise UserError(f"--workdir={workdir}: can't be locked ({error.strerror}); give another folder") from None
        if not is_ours:
            raise _in_use(workdir, self.read())

    def is_free_of(self, holder: dict) -> bool:
        """Whether the kernel knows that the holder is dead: it was on this host, and we have its lock now."""
        return holder.get("host") == _host()

    def age(self) -> float:
        """Seconds since the record was written, by the file system's clock: hosts' clocks may differ, and may be
        changed."""
        probe = self.path.with_name(f"{LOCK_NAME}.probe-{secrets.token_hex(4)}")
        probe.write_text("now")
        now = probe.stat().mtime
        probe.unlink()
        return now - self.path.stat().mtime

    def read(self) -> dict:
        try:
            return _holder(self.path.read_text())
        except FileNotFoundError:
            return {}

    def write(self, holder: dict) -> bool:
        """Writes in place, since the kernel's lock is on this very file, and at once, so that no reader finds it
        empty."""
        if os.pwrite(self._file, _record(holder), 0) != RECORD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True

    def is_gone(self) -> bool:
        """Whether the file was deleted or replaced, so that our lock is no longer on the file that others find."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return True


class _BucketLock:
    """The record in a bucket, read and written without caches."""

    def __init__(self, workdir: epath.Path):
        self.path = workdir / LOCK_NAME
        self._store = tensorstore.KvStore.open(kvstore(workdir)).result()
        self._version = None

    def is_free_of(self, holder: dict) -> bool:
        """False: nothing is known beyond the record."""
        return False

    def age(self) -> float:
        """Zero, since it is unknown: a process that wants to take over the lock must watch it for as long as a
        lease."""
        return 0.0

    def read(self) -> dict:
        found = self._store.read(LOCK_NAME).result()
        self._version = found.stamp.generation
        return _holder(found.value.decode(errors="replace"))

    def is_gone(self) -> bool:
        """False: the next write restores it, or reports that another process was faster."""
        return False

    def write(self, holder: dict) -> bool:
        """Writes if the record is still the one that was read last, and returns whether it is."""
        written = self._store.write(LOCK_NAME, _record(holder), if_equal=self._version).result()
        if not written.generation:
            return False
        self._version = written.generation
        return True


def _is_dead(lock: _FileLock | _BucketLock, holder: dict) -> bool:
    """Whether a holder that did not release the lock is dead; waits until that is certain."""
    if lock.is_free_of(holder):
        return True
    # Two beats at least: if a clock was set forward, the record of a live holder looks old.
    wait = min(max(LEASE_SECONDS - lock.age(), 2 * BEAT_SECONDS), LEASE_SECONDS)
    began = time.monotonic()
    while (left := wait - (time.monotonic() - began)) > 0:
        say(f"{lock.path} is held by {_who(holder)}: waiting {left:.0f} s to see whether it is alive")
        time.sleep(min(BEAT_SECONDS, left))
        if lock.read() != holder:
            return False
    return True


def _beat(lock: _FileLock | _BucketLock, own: dict, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        try:
            now = lock.read()
            if now and now.get("token") != own["token"]:
                _end(f"error: the lock {lock.path} was taken over by {_who(now)}; exiting")
            if lock.is_gone():
                _end(f"error: the lock {lock.path} was deleted; exiting, since another run may be using the folder now")
            lock.write(own | dict(beat=beat))
        except (OSError, ValueError):  # the network, or a full disk: the next beat may succeed
            continue


def _end(why: str) -> None:
    tell(why)
    os._exit(1)


def _record(holder: dict) -> bytes:
    checked = json.dumps(dict(holder=holder, crc32=_crc32(holder))) if holder else ""
    return checked.ljust(RECORD_BYTES).encode()


def _holder(record: str) -> dict:
    """The lock's holder; empty if there is none, or if only a part of the record was written."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        checked = json.loads(record)
        if checked["crc32"] == _crc32(checked["holder"]):
            return checked["holder"]
    return {}


def _crc32(holder: dict) -> int:
    return zlib.crc32(json.dumps(holder, sort_keys=True).encode())


def _host() -> str:
    """A name for this machine that changes when it is rebooted."""
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
    except (OSError, ValueError) as error:  # tensorstore raises ValueErrors for a bucket
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise UserError(f"--workdir={workdir}: can't be used ({why}); give a folder that can be written") from None
