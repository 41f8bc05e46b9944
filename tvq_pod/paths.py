"""Local folders and buckets are both paths (etils.epath); this says which is which."""

import os

from etils import epath


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is in an object store (gs://), where nothing can be appended to, renamed at once, or locked."""
    return "://" in str(path)


def write_whole(path: epath.Path, text: str, sync: bool = False) -> None:
    """Writes a file so that whoever reads it finds the old text or the new, never a part.

    sync: returns only when the disk has it, so that it outlives the machine's sudden end.
    """
    if is_bucket(path):  # an object appears at once
        path.write_text(text)
        return
    draft = path.with_name(path.name + ".writing")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(draft, path)


def free_name(path: epath.Path) -> epath.Path:
    """The path, or with -2, -3 ... behind it if something is there already."""
    candidate, n = path, 1
    while candidate.exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate
