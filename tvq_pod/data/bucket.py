"""Objects in a bucket, gs://, as files of a corpus: which there are, and their bytes, some of which are fetched ahead.

gcsfs lists, globs and fetches, and tries a request that fails six times, for half a minute. A listing is a snapshot:
an object is read in the version that was listed, or not at all.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import logging
import os
import pathlib
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from tvq_pod.data.retry import retried
from tvq_pod.errors import UserError
from tvq_pod.host.paths import BUCKET

HEAD_BYTES = 2**18  # of an object that are fetched first: all of a small one
BLOCK_BYTES = 2**22  # that are fetched at a time, after that
BLOCKS_AHEAD = 4  # of an object that is read in order
OBJECTS_AHEAD = 16  # whose heads are fetched before they are asked for

T = TypeVar("T")


@functools.cache
def filesystem():
    """gcsfs, which asks the bucket for each listing anew. Call `cache_clear()` if the environment has changed."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # a page for each try; what it raises says as much
    return fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)


@functools.cache
def _threads() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(OBJECTS_AHEAD, "bucket")


def _may_pass(error: Exception) -> bool:
    from gcsfs.retry import is_retriable

    return is_retriable(error) or isinstance(error, (ConnectionError, TimeoutError))


def _asked(source: str, call: Callable[[], T]) -> T:
    return retried(source, call, _may_pass)


# ------------------------------------------------- which objects there are
@dataclasses.dataclass(frozen=True, slots=True)
class Object:
    """An object as it was when it was listed. It has what is used here of a pathlib.Path.

    path: gs://BUCKET/NAME. size: in bytes. version: which the bucket calls the generation; "" where it has none.
    """

    path: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.path

    @property
    def suffix(self) -> str:
        """As of a path."""
        return os.path.splitext(self.path)[1]

    def stat(self) -> types.SimpleNamespace:
        """Its size, and a number that is another one when its content is."""
        return types.SimpleNamespace(st_size=self.size, st_mtime_ns=int(self.version or 0))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Its content, fetched as it is read. Raises UserError, also later, if the bucket can't be reached, or the
        object is not what it was when it was listed."""
        assert mode == "rb", mode
        return io.BufferedReader(_Reader(_AHEAD.get(self) or _Blocks(self)), 2**16)


Place = pathlib.Path | Object


def _object(info: dict) -> Object:
    path = BUCKET + info["name"]
    if info.get("contentEncoding"):
        raise UserError(
            f"config.data.source={path}: is stored with Content-Encoding {info['contentEncoding']}, with which it has "
            f"no size; run `gcloud storage objects update --clear-content-encoding {path}`, and it is decompressed here"
        )
    return Object(path, int(info["size"]), str(info.get("generation") or ""))


def found_at(path: str) -> Object | str | None:
    """What is at gs://BUCKET/NAME: an object; the path itself if it is a folder of objects; None if there is nothing.

    Raises UserError if the bucket can't be reached."""
    if not path.removeprefix(BUCKET).strip("/").partition("/")[2]:
        return path
    try:
        info = _asked(path, lambda: filesystem().info(path.rstrip("/")))
    except FileNotFoundError:
        return None
    return _object(info) if info["type"] == "file" and not path.endswith("/") else path


def found_by(pattern: str, hidden: bool) -> list[Object | str]:
    """What a glob matches, in the order of the paths: objects, and paths of folders. hidden: also what is hidden and
    not asked for by a part of the pattern. Raises UserError as `found_at` does."""
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
    """The objects below a folder, by their paths below it. Raises UserError as `found_at` does."""
    folder = folder.rstrip("/")
    try:
        infos = _asked(folder, lambda: filesystem().find(folder, detail=True))
    except FileNotFoundError:
        infos = {}
    start = len(folder.removeprefix(BUCKET)) + 1
    return {  # an object whose name ends with a slash stands for an empty folder
        name[start:]: _object(info) for name, info in infos.items() if name[start:] and not name.endswith("/")
    }


# ------------------------------------------------- what is in them
class _Blocks:
    """The bytes of an object, in blocks that are fetched by other threads."""

    def __init__(self, of: Object):
        self._of, self._lock = of, threading.Lock()
        self._futures: dict[int, concurrent.futures.Future[bytes]] = {}
        self._n = 0 if not of.size else 1 + -(-max(0, of.size - HEAD_BYTES) // BLOCK_BYTES)
        self._last = -1

    @property
    def size(self) -> int:
        return self._of.size

    def begin(self, number: int) -> None:
        """Fetches a block, if there is one of this number, and nobody else does."""
        with self._lock:
            self._begin(number)

    def _begin(self, number: int) -> None:
        if number < self._n and number not in self._futures:
            self._futures[number] = _threads().submit(self._fetch, number)

    def _bounds(self, number: int) -> tuple[int, int]:
        begin = HEAD_BYTES + (number - 1) * BLOCK_BYTES if number else 0
        return begin, min(self._of.size, HEAD_BYTES + number * BLOCK_BYTES)

    def _fetch(self, number: int) -> bytes:
        begin, end = self._bounds(number)
        only = dict(generation=self._of.version) if self._of.version else {}
        return filesystem().cat_file(self._of.path, start=begin, end=end, **only)

    def at(self, place: int) -> tuple[memoryview, int]:
        """The block that has the byte at `place`, and where in it that is."""
        number = 0 if place < HEAD_BYTES else 1 + (place - HEAD_BYTES) // BLOCK_BYTES
        begin, end = self._bounds(number)
        try:
            block = _asked(self._of.path, lambda: self._result(number))
        except FileNotFoundError:
            block = b""
        if len(block) != end - begin:
            raise UserError(
                f"config.data.source={self._of.path}: has changed, or is gone, since it was listed; start again with "
                "a corpus that nobody writes to"
            )
        return memoryview(block), place - begin

    def _result(self, number: int) -> bytes:
        with self._lock:
            in_order = number in (self._last, self._last + 1)
            self._last = number
            ahead = range(number, number + 1 + (BLOCKS_AHEAD if in_order else 0))
            for old in self._futures.keys() - {0, *ahead}:
                self._futures.pop(old).cancel()
            for block in ahead:
                self._begin(block)
            future = self._futures[number]
        try:
            return future.result()
        except Exception:
            with self._lock:
                self._futures.pop(number, None)  # the next try is a new one
            raise

    def close(self) -> None:
        """Whatever is not being fetched yet is not."""
        with self._lock:
            for future in self._futures.values():
                future.cancel()
            self._futures.clear()


class _Reader(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: _Blocks):
        self._blocks, self._place = blocks, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._blocks.size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer) -> int:
        if self._place >= self._blocks.size:
            return 0
        block, begin = self._blocks.at(self._place)
        n = min(len(buffer), len(block) - begin)
        buffer[:n] = block[begin : begin + n]
        self._place += n
        return n


_AHEAD: dict[Object, _Blocks] = {}  # whose heads are being fetched


class Placed(Protocol):
    """What is at a place."""

    @property
    def at(self) -> Place: ...


P = TypeVar("P", bound=Placed)


def read_ahead(files: Iterable[P]) -> Iterator[P]:
    """Files in their order; the heads of those objects in a bucket that come next are fetched meanwhile."""
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
