"""Writing files and folders completely or not at all, and reporting files that could not be written."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say

if TYPE_CHECKING:  # launch writes files on machines that may only have absl and filelock
    from etils import epath


def write_whole(path: "epath.Path | pathlib.Path", content: str | bytes, sync: bool = False, mode: int = 0o666) -> None:
    """Writes a file so that a reader finds either the old content or the new, never a part.

    content: bytes, or text, which is written as UTF-8. sync: returns only when the content is on disk, so that it
    survives a crash of the machine. mode: of a new file, as in os.open. Only one process may write a path at a time.
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
    """Yields the path of a draft to write in the block; then it replaces the local file `path` atomically.

    by_many: whether several processes may write the file at the same time, so that each needs its own draft. Otherwise
    all drafts have one name, and the next process overwrites the draft of a killed one. An error in the block removes
    the draft.
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
    """Raises UserError if a folder that is to be made is not empty.

    setting: the flag that gave it. written_last: the name of the file that makes the folder complete; in a bucket, only
    that file counts, not what a killed attempt left behind.
    """
    if (path / written_last).exists() if is_bucket(path) else os.path.lexists(path) and not _is_empty_folder(path):
        raise UserError(f"{setting}={path}: already exists, and nothing in it is replaced; give a new folder")


def _is_empty_folder(path: "epath.Path") -> bool:
    return os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path)


@contextlib.contextmanager
def new_folder(setting: str, path: "epath.Path") -> "Iterator[epath.Path]":
    """Yields the path of an existing draft to fill in the block; then it becomes the folder `path` atomically.

    In a bucket nothing can be renamed, so the draft is `path` itself there, and the file that makes it complete must be
    written last. An error in the block removes a local draft; a killed process leaves it as PATH.writing-NUMBER. Raises
    UserError if the disk fails. setting: the flag that gave `path`.
    """
    draft = path if is_bucket(path) else path.with_name(f"{path.name}.writing-{os.getpid()}")
    try:
        if not is_bucket(path):
            shutil.rmtree(draft, ignore_errors=True)  # from a killed process that had our process id
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
    """Returns the path, or the path with -2, -3 ... appended if it already exists."""
    candidate, n = path, 1
    while candidate.exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate


class Unwritten:
    """Files that could not be written, to be reported in one line without ending the program."""

    def __init__(self):
        self._failed: dict[str, str] = {}  # the reason, by path

    @contextlib.contextmanager
    def unless(self, path: "epath.Path") -> Iterator[None]:
        """Runs a block that writes a file; if it fails, keeps the path and the reason."""
        try:
            yield
        except Exception as error:  # each file system has its own exceptions
            self._failed[str(path)] = getattr(error, "strerror", None) or str(error)

    def tell(self) -> None:
        """Prints one line if there were failures."""
        if self._failed:
            why = " ".join(", ".join(dict.fromkeys(self._failed.values())).split())[:300]
            say(f"WARNING: {', '.join(self._failed)} can't be written ({why})")
