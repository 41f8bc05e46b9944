"""One run's folder, and the lock that keeps a second run out of it, on this host or another.

The lock is a file, WORKDIR/lock: who holds it, and a number that its holder counts up while it lives. On one host the
kernel's own lock on that file (flock) decides: it is dropped when its process ends, however it ends. Between hosts, and
in a bucket, a holder whose number has stood still for LEASE_SECONDS is dead. In a bucket each write says which version
it replaces, and of two that would take the lock at once, one is refused.
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
LEASE_SECONDS = 60.0  # without one, a holder is dead
RECORD_BYTES = 512  # of the lock


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
        if takes_over:  # so may another host: the last to write has it
            time.sleep(BEAT_SECONDS / 5)
            if (now := lock.read()).get("token") != own["token"]:
                raise _in_use(workdir, now)
        if before:
            say(f"takes over the lock {workdir / LOCK_NAME} from {_who(before)}, which is dead")
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
    """The record in a local folder, which may be one of a network's; holds the kernel's lock on it."""

    def __init__(self, workdir: epath.Path, opened: contextlib.ExitStack):
        """Raises UserError if a process of this host has it."""
        self.path = workdir / LOCK_NAME
        with _usable(workdir):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        opened.callback(os.close, self._file)
        try:
            is_ours = lock_descriptor(self._file, blocking=False)
        except OSError as error:  # some network file systems
            raise UserError(f"--workdir={workdir}: can't be locked ({error.strerror}); give another folder") from None
        if not is_ours:
            raise _in_use(workdir, self.read())

    def is_free_of(self, holder: dict) -> bool:
        """Whether the kernel knows that the holder is dead: it was of this host, and its lock is ours now."""
        return holder.get("host") == _host()

    def age(self) -> float:
        """Seconds since the record was written, by the clock of where it lies: hosts' clocks may differ, and be set."""
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
        """Writes in place and at once, so that no reader finds an empty file: the kernel's lock is on this very
        file."""
        if os.pwrite(self._file, _record(holder), 0) != RECORD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True

    def is_gone(self) -> bool:
        """Whether the file was deleted or replaced: what is locked is not what others find any more."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return True


class _BucketLock:
    """The record in a bucket, read and written past all caches."""

    def __init__(self, workdir: epath.Path):
        self.path = workdir / LOCK_NAME
        self._store = tensorstore.KvStore.open(kvstore(workdir)).result()
        self._version = None

    def is_free_of(self, holder: dict) -> bool:
        """Nothing is known but what the record says."""
        return False

    def age(self) -> float:
        """Unknown: whoever wants to take the lock over must watch it for as long as a lease."""
        return 0.0

    def read(self) -> dict:
        found = self._store.read(LOCK_NAME).result()
        self._version = found.stamp.generation
        return _holder(found.value.decode(errors="replace"))

    def is_gone(self) -> bool:
        """Never: the next write brings it back, or says that another was there first."""
        return False

    def write(self, holder: dict) -> bool:
        """Whether the record was still the one that was read last; if not, nothing is written."""
        written = self._store.write(LOCK_NAME, _record(holder), if_equal=self._version).result()
        if not written.generation:
            return False
        self._version = written.generation
        return True


def _is_dead(lock: _FileLock | _BucketLock, holder: dict) -> bool:
    """Whether a holder that did not say goodbye is dead; waits for as long as that is not certain."""
    if lock.is_free_of(holder):
        return True
    # Two beats at least: by a clock that was set forward a living holder looks old.
    wait = min(max(LEASE_SECONDS - lock.age(), 2 * BEAT_SECONDS), LEASE_SECONDS)
    began = time.monotonic()
    while (left := wait - (time.monotonic() - began)) > 0:
        say(f"{lock.path} is held by {_who(holder)}: waits {left:.0f} s to see whether it lives")
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
                _end(f"error: the lock {lock.path} was taken over by {_who(now)}; ends")
            if lock.is_gone():
                _end(f"error: the lock {lock.path} was deleted; ends, since another run may have the folder now")
            lock.write(own | dict(beat=beat))
        except (OSError, ValueError):  # the network, or a full disk: the next beat may come through
            continue


def _end(why: str) -> None:
    tell(why)
    os._exit(1)


def _record(holder: dict) -> bytes:
    checked = json.dumps(dict(holder=holder, crc32=_crc32(holder))) if holder else ""
    return checked.ljust(RECORD_BYTES).encode()


def _holder(record: str) -> dict:
    """Who holds the lock; empty if nobody does, or only a part of the record was written."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        checked = json.loads(record)
        if checked["crc32"] == _crc32(checked["holder"]):
            return checked["holder"]
    return {}


def _crc32(holder: dict) -> int:
    return zlib.crc32(json.dumps(holder, sort_keys=True).encode())


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
    except (OSError, ValueError) as error:  # tensorstore's, of a bucket, are ValueErrors
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise UserError(f"--workdir={workdir}: can't be used ({why}); give a folder that can be written") from None
