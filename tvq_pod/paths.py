"""Local folders and buckets are both paths (etils.epath); this says which is which."""

from etils import epath


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is in an object store (gs://), where nothing can be appended to, renamed at once, or locked."""
    return "://" in str(path)
