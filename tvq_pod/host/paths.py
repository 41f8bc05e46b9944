"""Telling local folders from buckets, both of which are paths (etils.epath), and refusing paths that are neither.

All checks here run before anything is read or written.
"""

import glob
import logging
import os
import pathlib
import re

from tvq_pod.errors import UserError
from tvq_pod.host.extras import require

BUCKET = "gs://"
HUB = "hf:"  # a dataset of Hugging Face, which is only allowed as a corpus
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # s3://bucket, file:///folder; gs:/bucket, which lacks a slash
ROOTS = ("/gs", "/s3", "/az", "/hf")  # local folders that etils takes for buckets
PATH_BYTES = 3800  # Linux allows 4095; the rest is for the names of files inside a folder
NAME_BYTES = 220  # Linux allows 255, for the same reason


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in an object store (gs://), where nothing can be appended to, renamed atomically, or
    locked."""
    return str(path).startswith(BUCKET)


def check_path(setting: str, path: str, local_only: bool = False) -> None:
    """Raises UserError if this program can't use paths of this kind. Only the text of the path is checked.

    setting: the flag or setting that gave it. local_only: whether a bucket is refused, too.
    """
    here = f"{setting}={path}"
    try:
        path.encode()
    except UnicodeEncodeError:
        if not local_only:
            raise UserError(f"{setting}={os.fsencode(path)!r}: must be UTF-8; rename it") from None
    if path.startswith(BUCKET) and not local_only:
        _check_bucket(here, path.removeprefix(BUCKET))
        require("gcsfs", f"{here}: a bucket")
    elif SCHEME.match(path) or "://" in path:
        raise UserError(f"{here}: {_remedy(path, local_only)}")
    elif not local_only:
        _check_local(here, os.path.abspath(path))


def _check_bucket(here: str, path: str) -> None:
    if not re.match(r"[^/]", path):
        raise UserError(f"{here}: has no bucket; must be gs://BUCKET/FOLDER")
    if bad := sorted(set(path) & set("*?[]#\\\r\n")):  # for a#b, orbax writes to a
        raise UserError(f"{here}: has {' '.join(map(repr, bad))}, which no name in a bucket may have; rename it")


def check_source_paths(setting: str, source: str) -> None:
    """Raises UserError if the program can't read one of the comma-separated paths of a corpus. A source that exists as
    one path is not split."""
    for part in [] if os.path.exists(source) else [part.strip() for part in source.split(",")]:
        if part.startswith(BUCKET):
            _check_bucket(f"{setting}={part}", part.removeprefix(BUCKET).partition("/")[0])
        elif not part.startswith(HUB) and (SCHEME.match(part) or "://" in part):
            raise UserError(f"{setting}={part}: {_remedy(part, local_only=False)}")


def _check_local(here: str, full: str) -> None:
    """Does `check_path` for an absolute path on this machine that will be written to."""
    if full.startswith(tuple(f"{root}/" for root in ROOTS)):
        raise UserError(f"{here}: must not be below {', '.join(ROOTS)}, which are read as buckets; give another path")
    if "\\" in full:
        raise UserError(f"{here}: has a backslash in its full path, which TensorStore takes for a slash; rename it")
    if ":/" in f"{full}/":  # orbax turns gs:/checkpoints into gs://checkpoints
        raise UserError(f"{here}: has a name that ends with a colon in its full path; rename it")
    names = os.fsencode(full).split(b"/")
    if (size := len(b"/".join(names))) > PATH_BYTES:
        raise UserError(f"{here}: has {size} bytes with the folders above it; must have at most {PATH_BYTES}")
    if (size := max(map(len, names))) > NAME_BYTES:
        raise UserError(f"{here}: has a name of {size} bytes in it; must have at most {NAME_BYTES}")


def _remedy(path: str, local_only: bool) -> str:
    scheme, _, rest = path.partition(":")
    scheme, rest = scheme.lower(), "/" + rest.lstrip("/")
    if scheme == "file":
        return f"must be given without file://; give {rest}"
    if local_only:
        return "must be a path on this machine; copy it here"
    if scheme == "gs":
        return f"must be a local path, or gs://BUCKET/FOLDER; give gs:/{rest}"
    return f"{scheme}:// is not supported; give a local path, or gs://BUCKET/FOLDER"


def check_folder(setting: str, path: str) -> None:
    """Raises UserError if a local path that must be a folder, or a path above it, is a file."""
    if is_bucket(path):
        return
    full = pathlib.Path(path).absolute()
    for here in (full, *full.parents):
        if os.path.isfile(here):
            raise UserError(f"{setting}={path}: can't be used ({here} is a file); give a folder")


def check_saving(setting: str, path: str) -> None:
    """Raises UserError if checkpoints that orbax saves in this folder could not be read back: orbax treats the full
    path as a glob pattern and does not write the index."""
    full = path if is_bucket(path) else os.path.abspath(path)
    if full != glob.escape(full):
        odd = " ".join(sorted(set(full) & set("*?[")))
        raise UserError(
            f"{setting}={path}: the full path {full} has {odd}, so checkpoints could not be read back; give another"
        )


def check_reached(setting: str, path: str) -> None:
    """Raises UserError if a path is in a bucket that does not exist, is forbidden, or can't be reached. Makes one
    request."""
    if not is_bucket(path):
        return
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a page per try; its exception says as much
    bucket, _, folder = path.removeprefix(BUCKET).partition("/")
    here = f"{setting}={path}"
    try:
        # Listing a folder that does not exist gives an empty list; only a missing bucket is an error.
        fsspec.filesystem("gs").call("GET", "b/{}/o", bucket, prefix=folder, maxResults=1, json_out=True)
    except FileNotFoundError:
        raise UserError(f"{here}: the bucket gs://{bucket} does not exist; make it, or give another") from None
    except Exception as error:  # from gcsfs, aiohttp and google.auth
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if said.startswith("Forbidden") or getattr(error, "code", None) in (401, 403):
            remedy = "let this account list, read and write objects there, or log in as another"
            raise UserError(f"{here}: the bucket gs://{bucket} is forbidden ({said}); {remedy}") from None
        raise UserError(f"{here}: the bucket gs://{bucket} can't be reached ({said}); try again") from None


def may_write(folder: os.PathLike[str]) -> bool:
    """Returns whether a local folder, or the nearest existing folder above it, can be written to."""
    full = pathlib.Path(folder).absolute()
    there = next((path for path in (full, *full.parents) if path.exists()), full)
    return os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
