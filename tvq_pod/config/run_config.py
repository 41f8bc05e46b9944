"""A run's own config, WORKDIR/config.json; and the config file that main takes when none is given, which reads it."""

import dataclasses
import json

import ml_collections
from etils import epath

from tvq_pod.config.names import with_names_of_now
from tvq_pod.config.resolve import build, config_of, default_config
from tvq_pod.config.settings import NOT_IN_CONFIG, Settings
from tvq_pod.errors import UserError
from tvq_pod.host.paths import check_path, check_reached


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """The run's settings. Raises UserError if there is no run."""
    return read_run_config(workdir)


def to_json(settings: Settings) -> str:
    """The resolved config as it is kept in a run's config.json."""
    tree = dataclasses.asdict(settings)
    for name in NOT_IN_CONFIG:
        del tree["model"][name]
    return json.dumps(tree, indent=2) + "\n"


def read_run_config(workdir) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`. Raises UserError if there is none, or it has names or types of its own."""
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
    filled = _filled(with_names_of_now(tree), default_config().to_dict())
    try:
        build(Settings, filled, "config")
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None
    return config_of(filled)


def _filled(tree: dict, default: dict) -> dict:
    """With the defaults of settings that the version that wrote it did not know."""
    filled = default | tree
    return {
        name: _filled(value, default[name])
        if isinstance(value, dict) and isinstance(default.get(name), dict)
        else value
        for name, value in filled.items()
    }
