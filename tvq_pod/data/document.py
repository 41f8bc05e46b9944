"""One document of a corpus, and the bytes of the files that documents are read from."""

import io
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tvq_pod.data.bucket import Object, Place
from tvq_pod.data.compressed import SNIFFED, compression_at, opened
from tvq_pod.errors import UserError

BIG_FILE = 2**26  # bytes; a file of this size, compressed or not, is not held in memory
SHOWN = 3  # names that a message lists


class Document(NamedTuple):  # many may be small, and this is created faster than a dataclass
    """One document. name: for messages and tables of losses. split: given by the corpus itself; None: the text's hash
    decides. problem: why the document has no text and is left out; "" if it has text. is_row: whether
    config.data.bad_rows, not config.data.invalid_utf8, says what happens if it is not UTF-8."""

    name: str
    text: bytes | memoryview
    split: str | None = None
    problem: str = ""
    is_row: bool = False


Documents = Iterator[Document]


class LineNames:
    """The names of consecutive lines, each made when it is asked for, since most are never used."""

    def __init__(self, file: str, first: int, n: int):
        """first: the number of the first line in its file, from 1."""
        self._file, self._first, self._n = file, first, n

    def __getitem__(self, place: int) -> str:
        return f"{self._file}:{self._first + place}"

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(self._n))


class Block(NamedTuple):
    """Documents that follow each other, as columns. Each has an entry for every document; see Document."""

    names: Sequence[str] | LineNames
    texts: Sequence[bytes | memoryview]
    splits: Sequence[str | None]
    problems: Sequence[str]
    are_rows: Sequence[bool]

    @staticmethod
    def of(documents: list[Document]) -> "Block":
        """Returns documents, of which there is at least one, as a block."""
        return Block._make(zip(*documents, strict=True))

    def document(self, place: int) -> Document:
        """Returns one of the documents."""
        return Document._make(column[place] for column in self)

    def documents(self) -> Documents:
        """Yields the documents."""
        return map(Document._make, zip(*self, strict=True))


class Names:
    """A count of names, and the first few of them."""

    def __init__(self):
        self.count, self._first = 0, []

    def add(self, name: str) -> None:
        """Counts a name."""
        self.count += 1
        if self.count <= SHOWN:
            self._first.append(printable(name))

    def extend(self, names: "Names", label: str = "") -> None:
        """Counts the names of another, with a label before each."""
        self.count += names.count
        self._first = (self._first + [label + name for name in names._first])[:SHOWN]

    def to_json(self) -> dict:
        """Returns the count and the first names as a dict."""
        return dict(count=self.count, first=self._first)

    @staticmethod
    def from_json(names: dict) -> "Names":
        """Returns the Names that `to_json` was called on."""
        found = Names()
        found.count, found._first = names["count"], list(names["first"])
        return found

    def __str__(self) -> str:
        return ", ".join(self._first) + (", ..." if self.count > SHOWN else "")


def printable(name: str) -> str:
    """Returns a file's name for one line of a message or a table; a name that can't be printed is escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def content(path: Place) -> bytes | memoryview:
    """Returns the content of a file, decompressed; big content stays on disk until it is used. Raises UserError if the
    file can't be read or is damaged."""
    if isinstance(path, Object):
        return _decompressed(path)
    try:
        if path.stat().st_size < BIG_FILE:
            read = path.read_bytes()
        else:
            with path.open("rb") as file:
                read = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UserError(f"config.data.source: {path} can't be read ({error.strerror})") from None
    return _decompressed(path) if compression_at(path, bytes(read[:SNIFFED])) else read


def _decompressed(path: Place) -> bytes | memoryview:
    """Returns the content of a file that is compressed or in a bucket, in memory or in an unnamed temporary file."""
    with opened(path) as file:
        begins = file.read(BIG_FILE)
        if len(begins) < BIG_FILE:
            return begins
        try:
            spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _no_room(path, error) from None
        with spool:
            block = begins
            while block:
                _write(path, spool, block)
                block = file.read(2**20)
            return memoryview(mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ))


def _write(path: Place, spool: io.FileIO, block: bytes) -> None:
    try:
        rest = memoryview(block)
        while rest:
            rest = rest[spool.write(rest) :]
    except OSError as error:
        raise _no_room(path, error) from None


def _no_room(path: Place, error: OSError) -> UserError:
    return UserError(
        f"config.data.source={path}: holds over {BIG_FILE // 2**20} MiB of text and can't be decompressed into "
        f"{tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder with room, or decompress it yourself"
    )
