"""Optional packages: code that needs one asks for it here, before anything is read or written."""

import importlib.util
import pathlib

from tvq_pod.errors import UserError

# The extra of pyproject.toml that brings each optional package, by the name that Python imports. Extras are spelled
# with hyphens, as in a package's metadata: pip before 23.3 finds them under no other spelling.
EXTRAS = {
    "PIL": "data",
    "apache_beam": "beam",
    "array_record": "data",
    "datasets": "hf",
    "gcsfs": "gcs",
    "libtpu": "tpu",
    "lm_eval": "lm-eval",
    "matplotlib": "bench",
    "pyarrow": "data",
    "tokenizers": "data",
    "wandb": "wandb",
    "zstandard": "data",
}


_IN_CLONE = (pathlib.Path(__file__).parents[2] / "pyproject.toml").is_file()


def is_installed(package: str) -> bool:
    """Returns whether an optional package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, what: str) -> None:
    """Raises UserError, "WHAT needs pip install -e '.[EXTRA]'", unless an optional package is installed. Outside a
    clone of the project, the command is pip install 'tvq_pod[EXTRA]'.

    package: a key of EXTRAS. what: the setting, its value, and what needs the package, for example
    "config.data.source=books.parquet: Parquet".
    """
    if not is_installed(package):
        raise UserError(f"{what} needs {install(EXTRAS[package])}")


def install(extra: str) -> str:
    """Returns the command that installs an extra of pyproject.toml."""
    return f"pip install -e '.[{extra}]'" if _IN_CLONE else f"pip install 'tvq_pod[{extra}]'"
