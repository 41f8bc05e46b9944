"""One document of a corpus, and the files that documents are read from."""

import dataclasses
import mmap
import os
import pathlib
from collections.abc import Iterator

from tvq_pod.errors import UserError

BIG_FILE = 2**26  # bytes; from there on a file is not read as a whole


@dataclasses.dataclass(frozen=True)
class Document:
    """name: for messages. split: where the corpus itself says which; None: its hash decides."""

    name: str
    text: bytes | memoryview
    split: str | None = None


Documents = Iterator[Document]


def files_of(root: pathlib.Path, glob: str) -> list[pathlib.Path]:
    """The files below a folder that match, in the order of their paths. Raises UserError if glob is no pattern, or a
    folder can't be read: pathlib would leave out in silence what is in it."""
    for _ in os.walk(root, onerror=_unreadable):
        pass
    try:
        paths = list(root.glob(glob))  # before Python 3.13 a wrong pattern is found only when files are asked for
    except (NotImplementedError, ValueError) as error:  # what pathlib raises for "/x" and ""
        raise UserError(f"config.data.glob={glob}: is no pattern ({error}); '**/*' takes all files") from None
    return sorted(path for path in paths if path.is_file())


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"config.data.source: {error.filename} can't be read ({error.strerror}); its files would be missing"
    )


def content(path: pathlib.Path) -> bytes | memoryview:
    """A file's bytes; those of a big one stay on disk until they are used. Raises UserError if it can't be read."""
    try:
        if path.stat().st_size < BIG_FILE:
            return path.read_bytes()
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UserError(f"config.data.source: {path} can't be read ({error.strerror})") from None
