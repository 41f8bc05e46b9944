"""Optional packages: what needs one asks for it here, before anything is read or written."""

import importlib.util

from tvq_pod.errors import UserError

# The extra of pyproject.toml that brings each optional package, by the name that Python imports.
EXTRAS = {
    "PIL": "data",
    "array_record": "data",
    "datasets": "hf",
    "gcsfs": "gcs",
    "libtpu": "tpu",
    "lm_eval": "lm_eval",
    "matplotlib": "bench",
    "pyarrow": "data",
    "tokenizers": "data",
    "wandb": "wandb",
    "zstandard": "data",
}


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, what: str) -> None:
    """Raises UserError, "WHAT needs pip install -e '.[EXTRA]'", unless an optional package is installed.

    package: a key of EXTRAS. what: the setting, its value, and what it is that needs the package, as in
    "config.data.source=books.parquet: Parquet".
    """
    if not is_installed(package):
        raise UserError(f"{what} needs pip install -e '.[{EXTRAS[package]}]'")
