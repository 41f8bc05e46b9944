"""The folder where a store is made: what may already be in it, and a lock so that only one process writes there."""

import contextlib
import os
from collections.abc import Iterator

import filelock
from etils import epath

from tvq_pod.data.arrays import named_errors
from tvq_pod.data.store import TokenStore
from tvq_pod.data.vocab import Vocab
from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say


@contextlib.contextmanager
def only_one(path: epath.PathLike) -> Iterator[None]:
    """Waits while another process on this host makes the store at `path`. A bucket can't be locked this way; there, the
    run's own lock has to suffice."""
    path = epath.Path(path)
    if is_bucket(path):
        yield
        return
    path = followed(path)
    file = path.with_name(f"{path.name}.lock")
    # The kernel's own lock or an error: the package's fallback lock would outlive a killed process.
    lock = filelock.FileLock(file, fallback_to_soft=False)
    with named_errors():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            say(f"waiting: another process is preparing {path}")
            lock.acquire()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release: a waiting process sees its file gone and makes a new one
        lock.release()


def adopted(path: epath.PathLike, vocab: Vocab, made_with: dict) -> TokenStore | None:
    """Returns a store that was complete, but not yet renamed, when its writer was killed; None if there is none."""
    path = followed(path)
    draft = path.with_name(f"{path.name}.preparing")
    if is_bucket(path) or not TokenStore.exists(draft):
        return None
    meta = TokenStore(draft).meta
    if (meta["vocab"], meta["made_with"]) != (vocab.name, made_with):
        return None
    check_free(path)
    with named_errors():
        os.rename(draft, path)
        (path / "progress.json").unlink(missing_ok=True)
    return TokenStore(path)


def followed(path: epath.PathLike) -> epath.Path:
    """Returns the target of a symbolic link, or the path itself if it is not a link. Raises UserError if the target
    does not exist."""
    if is_bucket(path) or not os.path.islink(path):
        return epath.Path(path)
    target = os.path.realpath(path)
    if not os.path.exists(target):
        raise UserError(
            f"config.data.store={path}: is a symbolic link to {target}, which does not exist; "
            "make that folder (or mount its disk), or remove the link"
        )
    return epath.Path(target)


def check_free(path: epath.PathLike) -> None:
    """Raises UserError if there is something at `path`: a store is only made where nothing exists."""
    path = followed(path)
    if not path.exists() or (path / "progress.json").exists():
        return
    if not path.is_dir() or any(entry.name != "lost+found" for entry in path.iterdir()):
        raise UserError(
            f"config.data.store={path}: holds something that is not a complete token store; remove it, or "
            "give another folder"
        )
