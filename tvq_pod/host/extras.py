"""Optional packages: what needs one asks for it here, before anything is read or written."""

import importlib.util
import pathlib

from tvq_pod.errors import UserError

# The extra of pyproject.toml that brings each optional package, by the name that Python imports.
EXTRAS = {
    "PIL": "data",
    "apache_beam": "beam",
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


_IN_CLONE = (pathlib.Path(__file__).parents[2] / "pyproject.toml").is_file()


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, what: str) -> None:
    """Raises UserError, "WHAT needs pip install -e '.[EXTRA]'", unless an optional package is installed. Without a
    clone of the project, the command in it is pip install 'tvq_pod[EXTRA]'.

    package: a key of EXTRAS. what: the setting, its value, and what it is that needs the package, as in
    "config.data.source=books.parquet: Parquet".
    """
    if not is_installed(package):
        raise UserError(f"{what} needs {install(EXTRAS[package])}")


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml."""
    return f"pip install -e '.[{extra}]'" if _IN_CLONE else f"pip install 'tvq_pod[{extra}]'"
