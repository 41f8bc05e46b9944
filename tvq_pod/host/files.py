"""Files and folders that are written completely or not at all, and files that could not be."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say

if TYPE_CHECKING:  # launch writes files where no package but absl and filelock may be installed
    from etils import epath


def write_whole(path: "epath.Path | pathlib.Path", content: str | bytes, sync: bool = False, mode: int = 0o666) -> None:
    """Writes a file so that whoever reads it finds the old content or the new, never a part.

    content: bytes, or text, which is written as UTF-8. sync: returns only when the disk has it, so that it outlives the
    machine's sudden end. mode: of a file that is made, as in os.open. At most one process may write a path at a time.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(path):  # an object appears at once
        path.write_bytes(data)
        return
    with replacing(path) as draft, open(draft, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: "epath.Path | pathlib.Path", by_many: bool = False) -> Iterator[pathlib.Path]:
    """The path of a draft, to be written in the block; then it takes the place of the local file `path`, at once.

    by_many: several processes may write the file at the same time, so that each has a draft of its own. Otherwise all
    drafts have one name, and what a killed process left there is written over by the next. An error in the block
    removes the draft.
    """
    draft = pathlib.Path(f"{path}.writing-{os.getpid()}" if by_many else f"{path}.writing")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def check_vacant(setting: str, path: "epath.Path", written_last: str) -> None:
    """Raises UserError if a folder that is to be made has something in it.

    setting: the flag that it was given by. written_last: the name of what makes the folder complete; in a bucket, what
    an attempt that was killed left there does not matter.
    """
    if (path / written_last).exists() if is_bucket(path) else os.path.lexists(path) and not _is_empty_folder(path):
        raise UserError(f"{setting}={path}: exists already, and nothing in it is replaced; give a new folder")


def _is_empty_folder(path: "epath.Path") -> bool:
    return os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path)


@contextlib.contextmanager
def new_folder(setting: str, path: "epath.Path") -> "Iterator[epath.Path]":
    """The path of a draft, which exists, to be filled in the block; then it becomes the folder `path`, at once.

    In a bucket nothing can be renamed, so there the draft is `path` itself, and what makes it complete must be written
    last. An error in the block removes a local draft; a process that is killed leaves it, PATH.writing-NUMBER. Raises
    UserError where the disk fails. setting: the flag that `path` was given by.
    """
    draft = path if is_bucket(path) else path.with_name(f"{path.name}.writing-{os.getpid()}")
    try:
        if not is_bucket(path):
            shutil.rmtree(draft, ignore_errors=True)  # of a killed process that had our number
            draft.mkdir(parents=True)
        yield draft
        if not is_bucket(path):
            os.rename(draft, path)
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())[:300]
        raise UserError(f"{setting}={path}: can't be written ({why}); make room, or give another folder") from None
    finally:
        if not is_bucket(path):
            shutil.rmtree(draft, ignore_errors=True)


def free_name(path: "epath.Path") -> "epath.Path":
    """The path, or with -2, -3 ... behind it if something is there already."""
    candidate, n = path, 1
    while candidate.exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate


class Unwritten:
    """Files that could not be written, to be told in one line; no reason to end."""

    def __init__(self):
        self._failed: dict[str, str] = {}  # by path: why

    @contextlib.contextmanager
    def unless(self, path: "epath.Path") -> Iterator[None]:
        """Writes a file, or keeps its path and what went wrong."""
        try:
            yield
        except Exception as error:  # each store has its own
            self._failed[str(path)] = getattr(error, "strerror", None) or str(error)

    def tell(self) -> None:
        """One line, if there is anything to tell."""
        if self._failed:
            why = " ".join(", ".join(dict.fromkeys(self._failed.values())).split())[:300]
            say(f"WARNING: {', '.join(self._failed)} can't be written ({why})")
