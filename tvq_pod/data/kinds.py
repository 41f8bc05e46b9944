"""Kinds of files, by their names, and whether a .json file holds rows."""

import json
import os
import re

from tvq_pod.data.bucket import Place
from tvq_pod.data.compressed import SUFFIXES as COMPRESSED_SUFFIXES
from tvq_pod.data.compressed import opened
from tvq_pod.errors import UserError

SUFFIXES = {  # of files of many documents; any other file is text or BINARY
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "json": (".json",),  # if it holds JSON lines
    "parquet": (".parquet", ".pq"),
    "arrayrecord": (".array_record", ".arrayrecord"),
}
ARCHIVES = (
    *(".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".lzma", ".z", ".npz", ".jar", ".whl"),
    *(".deb", ".rpm", ".iso", ".dmg", ".apk"),
)
BINARY = (
    *ARCHIVES,
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ico", ".heic", ".avif", ".psd"),
    *(".mp3", ".mp4", ".m4a", ".wav", ".flac", ".ogg", ".avi", ".mov", ".mkv", ".webm"),
    *(".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".odt", ".ods", ".epub", ".mobi"),
    *(".so", ".o", ".dll", ".exe", ".dylib", ".pyc", ".pyo", ".class", ".wasm", ".ttf", ".otf", ".woff", ".woff2"),
    *(".npy", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".safetensors", ".h5", ".hdf5", ".onnx", ".arrow"),
    *(".feather", ".orc", ".avro", ".tfrecord", ".sqlite", ".sqlite3"),
)
SHARD = re.compile(r"-\d+-of-\d+$")
HEAD_BYTES = 2**16  # of a .json file that are examined
ABOUT = re.compile(  # files that describe the files of records beside them
    r"(readme|license|licence|copying|notice|citation|changelog|authors)(\.\w+)?|_success|_metadata|_common_metadata"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|features\.json|sha256sums?|md5sums?|checksums?(\.\w+)?",
)


def plain_name(name: str) -> str:
    """Returns a file's name in lowercase, without a compression suffix and without -N-of-M."""
    name = SHARD.sub("", os.path.basename(name).lower())
    for suffix in COMPRESSED_SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return SHARD.sub("", name.removesuffix(suffix))
    return name


def suffix_of(name: str) -> str:
    """Returns the suffix that a file is counted under: .txt, .json.gz."""
    plain, name = plain_name(name), SHARD.sub("", os.path.basename(name).lower())
    return os.path.splitext(plain)[1] + (os.path.splitext(name)[1] if name != plain else "")


def kind_of(name: str) -> str:
    """Returns the kind of a file by its name: a key of SUFFIXES, "binary", or "text" for any other."""
    plain = plain_name(name)
    suffix = os.path.splitext(plain)[1]
    if suffix in BINARY:
        return "binary"
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), "text")


def is_about(name: str) -> bool:
    """Returns whether a file describes the files of records beside it, by its name."""
    return ABOUT.fullmatch(os.path.basename(name).lower()) is not None


def check_json_lines(path: Place) -> None:
    """Raises UserError if a .json file holds one value over several lines."""
    line, is_whole = _first_line(path)
    why = ""
    if line.startswith(b"["):
        why = "it is one JSON array"
    elif line and (not line.startswith(b"{") or (is_whole and _object_of(line) is None)):
        why = "its first line is not a JSON object"
    if why:
        raise UserError(
            f"config.data.source={path}: is not JSON lines: {why}; write one object per line (`jq -c .[] FILE` does "
            "so for an array), leave it out with config.data.exclude, or give config.data.format=text to read it "
            "as text"
        )


def first_row(path: Place) -> dict:
    """Returns the object in the first line of a .json file, or {} if that line is not one."""
    line, is_whole = _first_line(path)
    return (_object_of(line) or {}) if is_whole else {}


def _first_line(path: Place) -> tuple[bytes, bool]:
    """Returns the first line that is not blank, and whether it is complete."""
    with opened(path) as file:
        head = file.read(HEAD_BYTES)
    line, newline, _ = head.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    return line, bool(newline) or len(head) < HEAD_BYTES


def _object_of(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
