"""SHA-256 of trees of arrays, by which two runs can be compared."""

import hashlib
from collections.abc import Iterable

import jax
import numpy as np


def sha256_of(tree) -> str:
    """The SHA-256 of the paths, dtypes, shapes and bytes of a tree's arrays, in the order of their paths."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return sha256_of_arrays((path, np.asarray(leaves[path])) for path in sorted(leaves))


def sha256_of_arrays(named: Iterable[tuple[str, np.ndarray]]) -> str:
    """The `sha256_of` arrays that are given one after the other with their paths, in the paths' order. Each is held
    only while it is hashed."""
    digest = hashlib.sha256()
    for path, array in named:
        array = np.ascontiguousarray(array)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
        del array  # before the next one is read
    return digest.hexdigest()
