"""Whether the bytes of a document are text that a vocabulary can take."""

from tvq_pod.data.document import Document
from tvq_pod.errors import UserError

BLOCK_BYTES = 2**20  # of a document that are looked at at a time: it may be a file of any size


def usable(document: Document, any_bytes: bool, invalid_utf8: str) -> tuple[bytes | memoryview | None, bool]:
    """The text of a document as it is encoded, or None to leave it out; and whether it is not UTF-8."""
    place = _not_utf8(document.text)
    if place is None or any_bytes:
        return document.text, place is not None
    if invalid_utf8 == "error":
        raise UserError(
            f"config.data.invalid_utf8=error: {document.name} is not UTF-8 at byte {place}, and this "
            "vocabulary needs text; mend the file, or give replace or skip"
        )
    if invalid_utf8 == "skip":
        return None, True
    return bytes(document.text).decode("utf-8", errors="replace").encode("utf-8"), True


def _not_utf8(text: bytes | memoryview) -> int | None:
    """Where a text is not UTF-8; None if it is."""
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
