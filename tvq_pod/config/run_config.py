"""A run's own config, WORKDIR/config.json; and the config file that main takes when none is given, which reads it."""

import json
import os

import ml_collections
from etils import epath

from tvq_pod.config.names import with_current_names
from tvq_pod.config.resolve import build, config_of, tree_of
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.paths import check_path, check_reached


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """The run's settings. Raises UserError if there is no run."""
    return read_run_config(workdir)


def to_json(settings: Settings) -> str:
    """The resolved config as it is kept in a run's config.json."""
    return json.dumps(tree_of(settings), indent=2) + "\n"


def read_run_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`. It may be of an older version: settings that were renamed since are read, and
    those that it did not have get their defaults.

    Raises UserError if there is none, or one with other names or types.
    """
    check_path("--workdir", str(workdir))
    check_reached("--workdir", str(workdir))
    path = epath.Path(workdir) / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--workdir={workdir}: has no config.json; give the folder of a run, or --config=FILE"
        ) from None
    except OSError as error:
        raise UserError(f"--workdir={workdir}: config.json can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"--workdir={workdir}: config.json is not JSON ({error}); give --config=FILE") from None
    if not isinstance(tree, dict):
        raise UserError(f"--workdir={workdir}: config.json is no config; give --config=FILE")
    filled = _filled(with_current_names(tree), tree_of(Settings()))
    try:
        return config_of(build(Settings, filled, "config"))
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None


def _filled(tree: dict, default: dict) -> dict:
    """A tree of settings, with those of `default` that it does not have."""
    filled = default | tree
    for name, value in filled.items():
        if isinstance(value, dict) and isinstance(default.get(name), dict):
            filled[name] = _filled(value, default[name])
    return filled
