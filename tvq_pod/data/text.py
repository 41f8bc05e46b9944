"""Documents that are text files, or lines of them, and whether their bytes are text that a vocabulary can take."""

import io
import itertools
import sys
from collections.abc import Iterator

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.bucket import read_ahead
from tvq_pod.data.compressed import SNIFFED, binary_kind, check_has_lines, opened_lines
from tvq_pod.data.document import Block, Document, Documents, LineNames, content
from tvq_pod.data.sources import File, Listing
from tvq_pod.errors import UserError

LINES_BYTES = 2**20  # of lines to read at a time
BLOCK_BYTES = 2**20  # of a document to examine at a time: it may be a file of any size
SPLITS = ("train", "validation", "test")  # in the order of their parts in a text that is held out by position


def texts(listing: Listing, data: DataSettings) -> Documents:
    """Yields each file as a document, or each of its parts if it is held out by position."""
    for file in read_ahead(listing.files):
        text = content(file.at)
        if kind := binary_kind(bytes(text[:SNIFFED])):
            yield Document(file.name, b"", file.split, problem=f"{kind}, and not text")
        elif listing.holdout != "position":
            yield Document(file.name, text, file.split)
        else:
            check_has_lines(file.at, bytes(text[:SNIFFED]))
            for split, part in parts(text, data.validation_share, data.test_share):
                yield Document(f"{file.name}, {split}", part, split)


def lines(listing: Listing) -> Documents:
    """Yields each line of the files as a document, without its line end."""
    return itertools.chain.from_iterable(map(Block.documents, line_blocks(listing)))


def line_blocks(listing: Listing) -> Iterator[Block]:
    """Yields what `lines` does in blocks, which is faster."""
    for file in read_ahead(listing.files):
        with opened_lines(file.at, "lines of text") as opened:
            for first, found in numbered_lines(opened, file):
                n = len(found)
                yield Block(LineNames(file.name, first, n), found, [file.split] * n, [""] * n, [False] * n)


def numbered_lines(opened: io.BufferedReader, file: File) -> Iterator[tuple[int, list[bytes]]]:
    """Yields the lines of a file, or of a part of one, without line ends: lists of consecutive lines, each with the
    number in the file, from 1, of its first."""
    number, at, end = 1, 0, sys.maxsize
    if file.end is not None:
        number, at, end = file.n_before + 1, file.begin, file.end
        if at:
            opened.seek(at - 1)
            rest = opened.readline()  # of the previous line, which belongs to the part before
            number, at = number + (len(rest) > 1), at - 1 + len(rest)
    while at < end and (block := opened.read(min(LINES_BYTES, end - at))):
        if not block.endswith(b"\n"):
            block += opened.readline()
        at += len(block)
        found = block.removesuffix(b"\n").split(b"\n")
        if b"\r" in block:
            found = [line.removesuffix(b"\r") for line in found]
        yield number, found
        number += len(found)


def parts(
    text: bytes | memoryview, validation_share: float, test_share: float
) -> Iterator[tuple[str, bytes | memoryview]]:
    """Yields (split, its part) of a text that is held out by position: the last bytes are for test, those before them
    for validation. Each part begins at the start of a line, or of a character if there are no lines. Empty parts are
    left out."""
    n, n_test, n_validation = len(text), round(len(text) * test_share), round(len(text) * validation_share)
    test = _line_begin(text, n - n_test) if n_test else n
    validation = _line_begin(text, min(n - n_test - n_validation, test - 1)) if n_validation else test
    for split, begin, end in zip(SPLITS, (0, validation, test), (validation, test, n), strict=True):
        if end > begin:
            yield split, text[begin:end]


def _line_begin(text: bytes | memoryview, at: int) -> int:
    """Returns the last place at or before `at` where a line begins, or, if that is far away, where a character does."""
    before = bytes(text[max(0, at - BLOCK_BYTES) : at])
    if (newline := before.rfind(b"\n")) >= 0 and at - len(before) + newline + 1 >= at // 2:
        return at - len(before) + newline + 1
    for begin in range(at, max(at - 4, -1), -1):
        if text[begin] & 0xC0 != 0x80:
            return begin
    return at


def usable(document: Document, any_bytes: bool, data: DataSettings) -> tuple[bytes | memoryview | None, bool]:
    """Returns the text of a document as it is to be encoded, or None to leave it out; and whether it is not UTF-8.

    any_bytes: whether the vocabulary takes any bytes. Raises UserError for what the settings call an error.
    """
    place = _not_utf8(document.text)
    if place is None or any_bytes:
        return document.text, place is not None
    name, value = ("bad_rows", data.bad_rows) if document.is_row else ("invalid_utf8", data.invalid_utf8)
    if value == "error":
        what, others = ("row", "skip") if document.is_row else ("file", "replace or skip")
        raise UserError(
            f"config.data.{name}=error: {document.name} is not UTF-8 at byte {place}, and this "
            f"vocabulary needs text; fix the {what}, or give {others}"
        )
    if value == "skip":
        return None, True
    return bytes(document.text).decode("utf-8", errors="replace").encode("utf-8"), True


def _not_utf8(text: bytes | memoryview) -> int | None:
    """Returns the first place where a text is not UTF-8; None if it is UTF-8."""
    at = 0
    while at < len(text):
        part = bytes(text[at : at + BLOCK_BYTES])
        try:
            part.decode("utf-8")
        except UnicodeDecodeError as error:
            is_cut = error.reason == "unexpected end of data" and error.start > 0
            if not is_cut:
                return at + error.start
            part = part[: error.start]  # in the middle of a character
        at += len(part)
    return None
