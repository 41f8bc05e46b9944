"""Objects in a bucket, gs://, as files of a corpus: listing them, and reading their bytes, partly ahead of need.

gcsfs lists, globs and fetches, and tries a failing request six times, for half a minute. A listing is a snapshot: an
object is read in the version that was listed, or not at all.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import logging
import os
import pathlib
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from tvq_pod.data.retry import retried
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require
from tvq_pod.host.paths import BUCKET

HEAD_BYTES = 2**18  # fetched first from an object: all of a small one
BLOCK_BYTES = 2**22  # fetched at a time after that
BLOCKS_AHEAD = 4  # fetched ahead from an object that is read in order
OBJECTS_AHEAD = 16  # whose heads are fetched before they are needed

T = TypeVar("T")


@functools.cache
def filesystem():
    """Returns gcsfs, without its cache of listings. Call `cache_clear()` if the environment has changed."""
    require("gcsfs", "config.data.source=gs://: a bucket")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a page per try; its exception says as much
    return fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)


@functools.cache
def _threads() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(OBJECTS_AHEAD, "bucket")


def _may_pass(error: Exception) -> bool:
    from gcsfs.retry import is_retriable

    return is_retriable(error) or isinstance(error, (ConnectionError, TimeoutError))


def _asked(source: str, call: Callable[[], T]) -> T:
    return retried(source, call, _may_pass, "let this account list and read objects there, or log in as another")


# ------------------------------------------------- listing objects
@dataclasses.dataclass(frozen=True, slots=True)
class Object:
    """An object as it was when it was listed. It has those methods of pathlib.Path that are used here.

    path: gs://BUCKET/NAME. size: in bytes. version: what the bucket calls the generation; "" if it has none.
    """

    path: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.path

    @property
    def suffix(self) -> str:
        """The end of the name, as `pathlib.Path.suffix` gives it."""
        return os.path.splitext(self.path)[1]

    def stat(self) -> types.SimpleNamespace:
        """The object's size, and a number that changes with its content."""
        return types.SimpleNamespace(st_size=self.size, st_mtime_ns=int(self.version or 0))

    def open(self, mode: str = "rb", in_order: bool = True) -> io.BufferedReader:
        """Opens the content, which is fetched as it is read. in_order: whether the next blocks are fetched ahead.
        Raises UserError, also during reads, if the bucket can't be reached, or the object has changed since it was
        listed."""
        assert mode == "rb", mode
        content = (_AHEAD.get(self) or _Blocks(self)) if in_order else _Ranges(self)
        return io.BufferedReader(_Reader(self.size, content), 2**16)


Place = pathlib.Path | Object


def _object(info: dict) -> Object:
    path = BUCKET + info["name"]
    if info.get("contentEncoding"):
        raise UserError(
            f"config.data.source={path}: is stored with Content-Encoding {info['contentEncoding']}, so its size is "
            f"unknown; run `gcloud storage objects update --clear-content-encoding {path}`; it is decompressed here"
        )
    return Object(path, int(info["size"]), str(info.get("generation") or ""))


def found_at(path: str) -> Object | str | None:
    """Returns what is at gs://BUCKET/NAME: an object; the path itself for a folder of objects; None for nothing.

    Raises UserError if the bucket can't be reached."""
    name = path.removeprefix(BUCKET).strip("/")
    try:
        if "/" not in name:  # a bucket: permission to list it is enough
            _asked(path, lambda: filesystem().call("GET", "b/{}/o", name, maxResults=1, json_out=True))
            return path
        info = _asked(path, lambda: filesystem().info(path.rstrip("/")))
    except FileNotFoundError:
        return None
    return _object(info) if info["type"] == "file" and not path.endswith("/") else path


def found_by(pattern: str, hidden: bool) -> list[Object | str]:
    """Returns what a glob matches, in the order of the paths: objects, and paths of folders. hidden: whether hidden
    ones match although no part of the pattern begins with a dot. Raises UserError as `found_at` does."""
    try:
        infos = _asked(pattern, lambda: filesystem().glob(pattern, detail=True)).values()
    except FileNotFoundError:
        return []
    asks = hidden or any(part.startswith(".") for part in pattern.removeprefix(BUCKET).split("/"))
    found = []
    for info in sorted(infos, key=lambda info: info["name"].split("/")):
        if asks or not any(part.startswith(".") for part in info["name"].split("/")):
            is_file = info["type"] == "file" and not info["name"].endswith("/")
            found.append(_object(info) if is_file else BUCKET + info["name"].rstrip("/"))
    return found


def found_below(folder: str) -> dict[str, Object]:
    """Returns the objects below a folder, by their paths relative to it. Raises UserError as `found_at` does."""
    folder = folder.rstrip("/")
    try:
        infos = _asked(folder, lambda: filesystem().find(folder, detail=True))
    except FileNotFoundError:
        infos = {}
    start = len(folder.removeprefix(BUCKET)) + 1
    return {  # an object whose name ends with a slash stands for an empty folder
        name[start:]: _object(info) for name, info in infos.items() if name[start:] and not name.endswith("/")
    }


# ------------------------------------------------- reading objects
class _Piece:
    """Some bytes of an object, which another thread starts to fetch at once."""

    def __init__(self, of: Object, begin: int, end: int):
        self._of, self._begin, self._end = of, begin, end
        self._future: concurrent.futures.Future[bytes] | None = _threads().submit(self._fetch)

    def _fetch(self) -> bytes:
        only = dict(generation=self._of.version) if self._of.version else {}
        return filesystem().cat_file(self._of.path, start=self._begin, end=self._end, **only)

    def _result(self) -> bytes:
        future = self._future or _threads().submit(self._fetch)
        self._future = None  # if it fails, the next try is a new one
        found = future.result()
        self._future = future
        return found

    def get(self) -> bytes:
        """Waits for the bytes. Raises UserError as `Object.open` says."""
        try:
            found = _asked(self._of.path, self._result)
        except FileNotFoundError:
            found = b""
        if len(found) != self._end - self._begin:
            raise UserError(
                f"config.data.source={self._of.path}: has changed or was deleted since it was listed; start again "
                "with a corpus that nobody writes to"
            )
        return found

    def cancel(self) -> None:
        """Cancels the fetch if it has not begun."""
        if self._future:
            self._future.cancel()


class _Blocks:
    """The bytes of an object that is read in order, in blocks, some of which are fetched ahead."""

    def __init__(self, of: Object):
        self._of, self._last = of, -1
        self._pieces: dict[int, _Piece] = {}
        self._n = 0 if not of.size else 1 + -(-max(0, of.size - HEAD_BYTES) // BLOCK_BYTES)

    def begin(self, number: int) -> None:
        """Starts to fetch a block, if it exists and is not being fetched yet."""
        if number < self._n and number not in self._pieces:
            begin = HEAD_BYTES + (number - 1) * BLOCK_BYTES if number else 0
            self._pieces[number] = _Piece(self._of, begin, min(self._of.size, HEAD_BYTES + number * BLOCK_BYTES))

    def read(self, place: int, n: int) -> bytes | memoryview:
        """Returns between 1 and n bytes from `place` on."""
        number = 0 if place < HEAD_BYTES else 1 + (place - HEAD_BYTES) // BLOCK_BYTES
        in_order = place > 0 and number in (self._last, self._last + 1)  # at 0, perhaps only the head is wanted
        self._last = number
        ahead = range(number, number + 1 + (BLOCKS_AHEAD if in_order else 0))
        for old in self._pieces.keys() - {0, *ahead}:
            self._pieces.pop(old).cancel()
        for block in ahead:
            self.begin(block)
        begin = place - (HEAD_BYTES + (number - 1) * BLOCK_BYTES if number else 0)
        return memoryview(self._pieces[number].get())[begin : begin + n]

    def close(self) -> None:
        """Cancels all fetches that have not begun."""
        for piece in self._pieces.values():
            piece.cancel()
        self._pieces.clear()


class _Ranges:
    """The bytes of an object that is read at random places: exactly those asked for, in pieces fetched in parallel."""

    def __init__(self, of: Object):
        self._of = of

    def read(self, place: int, n: int) -> bytes:
        """Returns n bytes from `place` on."""
        end = min(place + n, self._of.size)
        pieces = [_Piece(self._of, at, min(at + BLOCK_BYTES, end)) for at in range(place, end, BLOCK_BYTES)]
        return b"".join(piece.get() for piece in pieces)


class _Reader(io.RawIOBase):
    """A file over `_Blocks` or `_Ranges`."""

    def __init__(self, size: int, content: _Blocks | _Ranges):
        self._size, self._content, self._place = size, content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer) -> int:
        if self._place >= self._size:
            return 0
        found = self._content.read(self._place, len(buffer))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


_AHEAD: dict[Object, _Blocks] = {}  # objects whose heads are being fetched


class Placed(Protocol):
    """Anything with a place."""

    @property
    def at(self) -> Place: ...


P = TypeVar("P", bound=Placed)


def read_ahead(files: Iterable[P]) -> Iterator[P]:
    """Yields files in their order, while the heads of the next objects in a bucket are fetched."""
    waiting: deque[P] = deque()
    left = iter(files)
    try:
        while True:
            for file in left:
                waiting.append(file)
                if isinstance(at := file.at, Object):
                    _AHEAD.setdefault(at, _Blocks(at)).begin(0)
                if len(waiting) > OBJECTS_AHEAD:
                    break
            if not waiting:
                return
            file = waiting[0]
            yield file
            waiting.popleft()
            _forget(file.at)
    finally:
        for file in waiting:
            _forget(file.at)


def _forget(at: Place) -> None:
    if isinstance(at, Object):
        with contextlib.suppress(KeyError):
            _AHEAD.pop(at).close()
