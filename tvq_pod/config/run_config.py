"""A run's own config, WORKDIR/config.json. This is also the config file that main uses if none is given: it reads that
one."""

import json
import os

import ml_collections
from etils import epath

from tvq_pod.config.names import with_current_names
from tvq_pod.config.resolve import build, config_of, tree_of
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.paths import check_path, check_reached

FROM = "--from="  # precedes the folder of an exported model, instead of a run's


def get_config(folder: str) -> ml_collections.ConfigDict:
    """Returns the settings of a run, or of an exported model. Raises UserError if there are none."""
    return read_run_config(folder.removeprefix(FROM), "--from" if folder.startswith(FROM) else "--workdir")


def to_json(settings: Settings) -> str:
    """Formats the resolved config for a run's config.json."""
    return json.dumps(tree_of(settings), indent=2) + "\n"


def read_run_config(workdir: str | os.PathLike[str], flag: str = "--workdir") -> ml_collections.ConfigDict:
    """Reads the config of the run, or of the exported model, in `workdir`. It may come from an older version: settings
    that were renamed since are read, and those that it did not have get their defaults.

    flag: the flag that gave the folder. Raises UserError if there is no config, or one with other names or types.
    """
    here = f"{flag}={workdir}"
    remedy = "give --config=FILE" if flag == "--workdir" else "export the model again"
    check_path(flag, str(workdir))
    check_reached(flag, str(workdir))
    path = epath.Path(workdir) / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        what = "of a run, or --config=FILE" if flag == "--workdir" else "that --mode=export made"
        raise UserError(f"{here}: has no config.json; give the folder {what}") from None
    except OSError as error:
        raise UserError(f"{here}: config.json can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{here}: config.json is not JSON ({error}); {remedy}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{here}: config.json is not a config; {remedy}")
    filled = _filled(with_current_names(tree), tree_of(Settings()))
    try:
        return config_of(build(Settings, filled, "config"))
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None


def _filled(tree: dict, default: dict) -> dict:
    """A tree of settings, completed with those of `default` that it lacks."""
    filled = default | tree
    for name, value in filled.items():
        if isinstance(value, dict) and isinstance(default.get(name), dict):
            filled[name] = _filled(value, default[name])
    return filled
