"""Files that are written whole or not at all, and those that could not be."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say


def write_whole(path: epath.Path, text: str, sync: bool = False) -> None:
    """Writes a file so that whoever reads it finds the old text or the new, never a part.

    sync: returns only when the disk has it, so that it outlives the machine's sudden end.
    """
    if is_bucket(path):  # an object appears at once
        path.write_text(text)
        return
    draft = path.with_name(path.name + ".writing")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(draft, path)


def free_name(path: epath.Path) -> epath.Path:
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
    def unless(self, path: epath.Path) -> Iterator[None]:
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
