"""Cutting a corpus into the parts of a store.

The cut depends only on the files' sizes and a constant, not on the machine or the number of processes. Files go into a
part in their order until it has PART_BYTES. A larger file of lines is cut where a line begins, and a Parquet file
between row groups. A compressed file, a text that is one document, and a split of a Hugging Face dataset, whose size
is not known, are never cut. An object in a bucket is cut like a local file.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator

from tvq_pod.data.compressed import SNIFFED, compression_of
from tvq_pod.data.hub import absolute
from tvq_pod.data.records import as_parquet
from tvq_pod.data.sources import File, Listing
from tvq_pod.errors import UserError

PART_BYTES = 2**27  # of files; a corpus of less than 1.5 times this is one part
MOST_PARTS = 4096  # a corpus that would need more has larger parts
BLOCK_BYTES = 2**20


def cut(listing: Listing) -> list[list[File]]:
    """Returns the files, or parts of files, of each part of the store. `numbered` counts the lines before each part of
    a file. Raises UserError if a file can't be read."""
    sizes = [size_of(file) for file in listing.files]
    part_bytes = PART_BYTES
    while part_bytes * MOST_PARTS < sum(sizes):
        part_bytes *= 2
    parts, now, n_bytes = [], [], 0
    for whole, size in zip(listing.files, sizes, strict=True):
        for file, n in _cut_file(listing.format, whole, size, part_bytes):
            now.append(file)
            n_bytes += n
            if n_bytes >= part_bytes:
                parts.append(now)
                now, n_bytes = [], 0
    if parts and n_bytes < part_bytes // 2:
        parts[-1] += now
    elif now:
        parts.append(now)
    return parts


def size_of(file: File) -> int:
    """Returns the size of a file as stored, in bytes; 0 for a dataset. Raises UserError if it can't be read."""
    return _size_and_version(file)[0]


def address_of(file: File) -> str:
    """Returns where a file is, independent of the working directory."""
    if file.kind == "hf":
        return absolute(file.path)
    return file.path if file.object else os.path.abspath(file.path)


def _size_and_version(file: File) -> tuple[int, int]:
    if file.kind == "hf":
        return 0, 0
    try:
        status = file.at.stat()
        return status.st_size, status.st_mtime_ns
    except OSError as error:
        raise UserError(f"config.data.source: {file.path} can't be read ({error.strerror})") from None


def as_text(path: str) -> str:
    """Returns a path that may not be UTF-8 as text that is."""
    return path.encode("utf-8", "backslashreplace").decode()


def signature(files: Iterable[File]) -> str:
    """Returns JSON that identifies files, and parts of files, by name, place, size and time: a changed one is read
    again."""
    entries = []
    for file in files:
        size, version = _size_and_version(file)
        # A split by name depends on the other files, too.
        entry = dict(name=as_text(file.name), path=as_text(address_of(file)), size=size, modified=version)
        entries.append(entry | dict(begin=file.begin, end=file.end, split=file.split))
    return json.dumps(entries, separators=(",", ":"))


def check_unchanged(listing: Listing, signed: str) -> None:
    """Raises UserError if a file has changed since the listing had this signature."""
    if signature(listing.files) != signed:
        raise UserError(
            f"config.data.source={listing.source}: changed while it was read "
            f"({listing.files[0].name} or a file after it); start again"
        )


def _cut_file(format: str, file: File, size: int, part_bytes: int) -> Iterator[tuple[File, int]]:
    """Yields the parts of a file, and the size of each."""
    n_parts = (size + part_bytes // 2) // part_bytes
    if n_parts < 2 or format not in ("lines", "jsonl", "parquet") or _is_compressed(file):
        yield file, size
    elif format == "parquet":
        yield from _row_groups(file, size, part_bytes)
    else:
        for begin, end in itertools.pairwise([*range(0, n_parts * part_bytes, part_bytes), size]):
            yield dataclasses.replace(file, begin=begin, end=end), end - begin


def _is_compressed(file: File) -> bool:
    try:
        with file.at.open("rb") as opened:
            return compression_of(opened.read(SNIFFED)) is not None
    except OSError:  # the reader of the file reports it
        return True


def _row_groups(file: File, size: int, part_bytes: int) -> Iterator[tuple[File, int]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    bounds, rows, sizes = [0], [0], []
    with contextlib.suppress(pyarrow.ArrowException, OSError), ParquetFile(as_parquet(file.at)) as table:
        groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
        sizes = [sum(group.column(n).total_compressed_size for n in range(group.num_columns)) for group in groups]
        n_rows, n_bytes = 0, 0
        for number, (group, n) in enumerate(zip(groups, sizes, strict=True), 1):
            n_rows, n_bytes = n_rows + group.num_rows, n_bytes + n
            if n_bytes >= part_bytes:
                bounds.append(number)
                rows.append(n_rows)
                n_bytes = 0
        if bounds[-1] < len(groups):
            bounds.append(len(groups))
    if len(bounds) < 3:  # also for a damaged file: its reader reports it
        yield file, size
        return
    for (begin, end), n_before in zip(itertools.pairwise(bounds), rows, strict=False):
        yield dataclasses.replace(file, begin=begin, end=end, n_before=n_before), sum(sizes[begin:end])


def spans_of(parts: list[list[File]], format: str) -> list[File]:
    """Returns the parts of files whose lines must be counted, in their order."""
    return [] if format == "parquet" else [file for file in itertools.chain(*parts) if file.end is not None]


def lines_before(spans: list[File], n_lines: Iterable[int]) -> dict[tuple[str, int], int]:
    """Returns the number of lines that end before a place in a file, by its path and the place. n_lines: what
    `count_lines` returns for each span."""
    before: dict[tuple[str, int], int] = {}
    for file, n in zip(spans, n_lines, strict=True):
        before[file.path, file.end or 0] = before.get((file.path, file.begin), 0) + n
    return before


def numbered(files: list[File], before: dict[tuple[str, int], int]) -> list[File]:
    """Returns the files with the number of lines before each part of one, as `lines_before` counted them."""
    return [dataclasses.replace(file, n_before=before.get((file.path, file.begin), file.n_before)) for file in files]


def count_lines(file: File) -> int:
    """Returns the number of lines that end in a part of a file. Raises UserError if it can't be read."""
    at, end, n = file.begin, file.end or 0, 0
    try:
        with file.at.open("rb") as opened:
            opened.seek(at)
            while at < end and (block := opened.read(min(BLOCK_BYTES, end - at))):
                n += block.count(b"\n")
                at += len(block)
    except OSError as error:
        raise UserError(f"config.data.source: {file.path} can't be read ({error.strerror})") from None
    return n
