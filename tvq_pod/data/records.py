"""Corpora in files of many documents: JSON lines, plain or compressed, and Parquet. Read as streams, in the order of
their paths; a folder may hold several."""

import contextlib
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.document import Document, Documents, files_of
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require

SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "parquet": (".parquet",)}
BLOCK_BYTES = 2**12  # of a zstd file that are decompressed at a time: they may become 2**25
ROWS = 64  # of a Parquet file that are read at a time


def format_of(path: pathlib.Path) -> str | None:
    """The format that a file's name says; None for any other."""
    return next((kind for kind, suffixes in SUFFIXES.items() if path.name.endswith(suffixes)), None)


def _files(path: pathlib.Path, data: DataSettings, kind: str) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    found = [file for file in files_of(path, data.glob) if format_of(file) == kind]
    if not found:
        raise UserError(
            f"config.data.source={path}: has no file that ends with {' or '.join(SUFFIXES[kind])}, as "
            f"config.data.format={kind} says"
        )
    return found


def jsonl(path: pathlib.Path, data: DataSettings) -> Documents:
    """Each line is a JSON object whose `config.data.text_field` is a document; blank lines are passed over."""
    for file in _files(path, data, "jsonl"):
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(f"{file.name}:{number}", _text_of(line, number, file, data.text_field))


def _text_of(line: bytes, number: int, file: pathlib.Path, field: str) -> bytes:
    try:
        text = json.loads(line)[field]
    except ValueError as error:
        raise UserError(f"config.data.source={file}: line {number} is not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"config.data.source={file}: line {number} is nested too deeply") from None
    except (KeyError, TypeError):
        raise UserError(f"config.data.text_field={field}: line {number} of {file} has no such field") from None
    if not isinstance(text, str):
        raise UserError(f"config.data.text_field={field}: line {number} of {file} has no text there")
    return text.encode("utf-8", errors="replace")  # JSON can spell half of a surrogate pair, which UTF-8 can't


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Iterable[bytes]]:
    """The file's lines, decompressed as they are read. Raises UserError if it is damaged."""
    damage: tuple = (OSError, EOFError, zlib.error)
    with contextlib.ExitStack() as opened:
        if path.suffix == ".zst":
            require("zstandard", f"config.data.source={path}: .zst")
            import zstandard

            damage = (*damage, zstandard.ZstdError)
            decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        else:
            decompressor = None
        try:
            if path.suffix == ".gz":
                yield opened.enter_context(gzip.open(path))
            elif decompressor is not None:
                yield _lines_of(_decompressed(opened.enter_context(path.open("rb")), decompressor))
            else:
                yield opened.enter_context(path.open("rb"))
        except damage as error:
            raise UserError(f"config.data.source={path}: can't be read, or is damaged ({error})") from None


def _decompressed(file: BinaryIO, decompressor) -> Iterator[bytes]:
    """Blocks of a zstd file of one or more frames. The library's own reader takes a cut for the end."""
    frame = None
    while block := file.read(BLOCK_BYTES):
        while block:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("it ends too early")


def _lines_of(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = []
    for block in blocks:
        first, *more = block.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    yield b"".join(rest)


def parquet(path: pathlib.Path, data: DataSettings) -> Documents:
    """Each row's column `config.data.text_field` is a document."""
    require("pyarrow", f"config.data.source={path}: Parquet")
    import pyarrow
    import pyarrow.types as types
    from pyarrow.parquet import ParquetFile

    column = data.text_field
    for file in _files(path, data, "parquet"):
        row = 0
        try:
            with ParquetFile(file, memory_map=True) as table:
                if column not in table.schema_arrow.names:
                    there = ", ".join(table.schema_arrow.names)
                    raise UserError(f"config.data.text_field={column}: {file} has no such column, but {there}")
                for batch in table.iter_batches(ROWS, columns=[column]):
                    kind = batch.column(0).type
                    if not any(check(kind) for check in (types.is_string, types.is_large_string, types.is_binary,
                                                         types.is_large_binary)):  # fmt: skip
                        raise UserError(f"config.data.text_field={column}: {file} has {kind} there, and no text")
                    for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        row += 1
                        if text is None:
                            raise UserError(f"config.data.text_field={column}: row {row} of {file} has no text there")
                        yield Document(f"{file.name}:{row}", text)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"config.data.source={file}: can't be read, or is damaged ({' '.join(str(error).split())[:200]})"
            ) from None
