"""A folder's manifest: the size and CRC-32C of each of its files, so that damage is noticed before a file is used.

    FOLDER/manifest.json    {"files": {"params/d/0a1b...": [size, crc32c], ...}, "crc32c": of the text of "files"}

Orbax and TensorStore notice a truncated file, but not a flipped bit or a zeroed page in an array.
"""

import concurrent.futures
import errno
import json
from collections.abc import Iterable

import google_crc32c
from etils import epath

from tvq_pod.host.files import write_whole
from tvq_pod.run.orbax_files import ADDED_LAST

NAME = "manifest.json"
LEFT_OUT = (NAME, *ADDED_LAST)  # the manifest is written before orbax's last files, which tvq_pod does not read
CHUNK_BYTES = 8 * 1024 * 1024
THREADS = 8


def write_manifest(folder: epath.Path) -> None:
    """Reads every file of the folder, and writes its manifest. Raises OSError."""
    names = sorted(_files(folder))
    files = dict(zip(names, _on_threads(folder, names), strict=True))
    write_whole(folder / NAME, json.dumps(dict(files=files, crc32c=_crc_of(files)), indent=1) + "\n", sync=True)


def fingerprint(folder: epath.Path) -> str:
    """A fingerprint of the folder's files: 8 hexadecimal digits, from their names, sizes and checksums. The manifest
    must be good."""
    return f"{json.loads((folder / NAME).read_text())['crc32c']:08x}"


def problems(folder: epath.Path, part: int = 0, of: int = 1) -> list[str]:
    """The folder's problems, a line each: files that are missing, truncated or changed since its manifest was written,
    or a manifest that is missing or damaged itself. Empty if there are none.

    part, of: checks part `part` of `of` equal parts of the files, for processes that share the work. Raises OSError if
    a file can't be read, except for a fault of the disk itself, which is damage.
    """
    try:
        manifest = json.loads((folder / NAME).read_text())
        files = manifest["files"]
        if manifest["crc32c"] != _crc_of(files):
            return [f"{folder / NAME}: is damaged"]
    except FileNotFoundError:
        return [f"{folder / NAME}: is missing"]
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return [f"{folder / NAME}: can't be read ({error.strerror})"]
    except (KeyError, TypeError, ValueError):
        return [f"{folder / NAME}: is damaged"]
    names = sorted(files)[part::of]
    found = _on_threads(folder, names)
    return [
        f"{folder / name}: {_difference(files[name], now)}"
        for name, now in zip(names, found, strict=True)
        if now != files[name]
    ]


def _difference(then: list[int], now: list[int] | str) -> str:
    if isinstance(now, str):
        return now
    return f"has {now[0]} bytes of {then[0]}" if now[0] != then[0] else "its content has changed (CRC-32C)"


def _files(folder: epath.Path, below: str = "") -> Iterable[str]:
    for path in (folder / below).iterdir():
        name = f"{below}{path.name}"
        if path.is_dir():
            yield from _files(folder, f"{name}/")
        elif name not in LEFT_OUT:
            yield name


def _on_threads(folder: epath.Path, names: list[str]) -> list[list[int] | str]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda name: _size_and_crc(folder / name), names))


def _size_and_crc(path: epath.Path) -> list[int] | str:
    """The size and CRC of a file; or what is wrong with it."""
    try:
        size, crc = 0, 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                size, crc = size + len(chunk), google_crc32c.extend(crc, chunk)
        return [size, crc]
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"can't be read ({error.strerror})"


def _crc_of(files: dict) -> int:
    return google_crc32c.value(json.dumps(files, sort_keys=True).encode())
