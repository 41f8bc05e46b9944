"""Compressed files, which are recognized by their first bytes and read decompressed, and the first bytes of files that
hold no text."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from tvq_pod.data.bucket import Place
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require

SNIFFED = 512  # bytes at the beginning of a file that say what it is
BLOCK_BYTES = 2**12  # of a zstd file that are decompressed at a time: they may become 2**25
SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
COMPRESSIONS = {
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
}
BINARY = {
    "a zip archive": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    "a tar archive": rb".{257}ustar",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a rar archive": rb"Rar!\x1a\x07",
    "an lz4 file": rb"[\x02\x04]\x22\x4d\x18|\x02\x21\x4c\x18",
    "an lzma file": rb"\x5d\x00\x00.{2}(\xff{8}|.{5}\x00{3})\x00",
    "a zlib file": rb"\x78\x9c",
    "a snappy file": rb"\xff\x06\x00\x00sNaPpY",
    "a file of Unix compress": rb"\x1f[\x9d\xa0]",
    "a Parquet file": rb"PAR1\x15",
    "an Arrow file": rb"ARROW1\x00\x00",
    "an HDF5 file": rb"\x89HDF\r\n\x1a\n",
    "a NumPy array": rb"\x93NUMPY",
    "an SQLite database": rb"SQLite format 3\x00",
    "a program": rb"\x7fELF|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|MZ.{58}..\x00\x00",
    "an image": (
        rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|II\*\x00|MM\x00\*|RIFF.{4}WEBP|\x00\x00\x01\x00[\x01-\x20]\x00"
    ),
    "a PDF file": rb"%PDF-\d",
    "an Office document": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "a SentencePiece model": rb"\n[\x08-\x20]\n[\x03-\x08]<",
    "sound": rb"RIFF.{4}WAVE|ID3[\x00-\x0f]|OggS\x00|fLaC\x00",
    "a video": rb"RIFF.{4}AVI |\x1a\x45\xdf\xa3|.{4}ftyp[a-zA-Z0-9 ]{4}\x00",
}
WIDE = re.compile(rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff")  # byte order marks of UTF-16 and UTF-32
_COMPRESSIONS = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in COMPRESSIONS.items()}
_COMPRESSED = re.compile(b"|".join(COMPRESSIONS.values()), re.DOTALL)
_BINARY = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in BINARY.items()}
_ANY_BINARY = re.compile(b"|".join((*BINARY.values(), *COMPRESSIONS.values())), re.DOTALL)


def compression_of(begins: bytes) -> str | None:
    """Returns how a file is compressed: a key of COMPRESSIONS, or None. begins: its first SNIFFED bytes, or all if it
    has fewer."""
    if not _COMPRESSED.match(begins):
        return None
    return next(kind for kind, pattern in _COMPRESSIONS.items() if pattern.match(begins))


def binary_kind(begins: bytes) -> str | None:
    """Returns what kind of file holds no text, in words; None for any other file. begins: as in `compression_of`, but
    of the decompressed content. A file that is compressed twice counts as one without text."""
    if not _ANY_BINARY.match(begins):
        return None
    return next((kind for kind, pattern in _BINARY.items() if pattern.match(begins)), "compressed twice")


def compression_at(path: Place, begins: bytes) -> str | None:
    """`compression_of` a file with a name. Raises UserError if its name is that of a compressed file, but its bytes are
    neither compressed nor text."""
    kind = compression_of(begins)
    if not kind and path.suffix.lower() in SUFFIXES:
        text = begins[:SNIFFED]
        is_text = b"\0" not in text and any(_is_utf8(text[: len(text) - cut]) for cut in range(4))
        if not is_text:
            raise UserError(
                f"config.data.source={path}: can't be read, or is damaged (it does not begin as a {path.suffix} file)"
            )
    return kind


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


@contextlib.contextmanager
def opened(path: Place) -> Iterator[io.BufferedReader]:
    """Opens a file, which is decompressed as it is read. Raises UserError, also during reads, if it is damaged or can't
    be read."""
    damage: tuple = (OSError, EOFError, zlib.error, lzma.LZMAError)
    with contextlib.ExitStack() as files:
        try:
            file = files.enter_context(path.open("rb"))
            kind = compression_at(path, file.peek(SNIFFED)[:SNIFFED])
            if kind == "zstd":
                require("zstandard", f"config.data.source={path}: zstd")
                import zstandard

                damage = (*damage, zstandard.ZstdError)
                frames = zstandard.ZstdDecompressor(max_window_size=2**31)
                yield io.BufferedReader(_Blocks(_decompressed(file, frames.decompressobj)), 2**16)
            elif kind == "gzip":
                yield io.BufferedReader(files.enter_context(gzip.open(file)), 2**16)  # pyright: ignore[reportArgumentType]
            elif kind:
                new_frame = dict(bzip2=bz2.BZ2Decompressor, xz=lzma.LZMADecompressor)[kind]
                yield io.BufferedReader(_Blocks(_decompressed(file, new_frame, b"\0" if kind == "xz" else b"")), 2**16)
            else:
                yield file
        except damage as error:
            raise UserError(f"config.data.source={path}: can't be read, or is damaged ({error})") from None


@contextlib.contextmanager
def opened_lines(path: Place, what: str) -> Iterator[io.BufferedReader]:
    """Opens a file of lines as `opened` does. what: what it should hold, in words. Raises UserError if it is binary."""
    with opened(path) as file:
        if kind := binary_kind(file.peek(SNIFFED)[:SNIFFED]):
            raise UserError(f"config.data.source={path}: is {kind}, and not {what}; leave it out")
        check_has_lines(path, file.peek(SNIFFED)[:SNIFFED])
        yield file


def check_has_lines(path: Place, begins: bytes) -> None:
    """Raises UserError if a byte order mark says that a text is UTF-16 or UTF-32: a cut at a newline byte would fall
    inside a character."""
    if WIDE.match(begins):
        raise UserError(
            f"config.data.source={path}: is UTF-16 or UTF-32, and must be UTF-8 to be cut into lines; convert it, for "
            "example with `iconv -f utf-16 -t utf-8 FILE`"
        )


def first_bytes(path: Place, n: int = SNIFFED) -> tuple[bytes, bytes]:
    """Returns the first n bytes of a file as stored, and the first n of its decompressed content."""
    with opened(path) as file:
        inside = file.read(n)
    with path.open("rb") as file:
        return file.read(n), inside


def _decompressed(file: BinaryIO, new_frame: Callable, padding: bytes = b"") -> Iterator[bytes]:
    """Yields the content of a file of one or more frames (zstd) or streams (bzip2, xz), with `padding` between them.
    The libraries' own readers end silently where a file was cut off, or at anything else that follows a frame."""
    frame = None
    while block := file.read(BLOCK_BYTES):
        while block:
            if frame is None:
                block = block.lstrip(padding) if padding else block
                if not block:
                    break
                frame = new_frame()
            yield frame.decompress(block)
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("it ends too early")


class _Blocks(io.RawIOBase):
    """A file over blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n
