"""Local folders and buckets are both paths (etils.epath); this says which is which."""

import os

from etils import epath


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is in an object store (gs://), where nothing can be appended to, renamed at once, or locked."""
    return "://" in str(path)


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that whoever reads it finds the old text or the new, never a part."""
    if is_bucket(path):  # an object appears at once
        path.write_text(text)
        return
    draft = path.with_name(path.name + ".writing")
    draft.write_text(text)
    os.replace(draft, path)
