"""The configs that come with tvq_pod, which `--config=NAME` finds without a path.

A wheel has the files of configs/ in tvq_pod/configs; in a clone they are beside tvq_pod. They are found as files and
not imported, so they need no package of their own.
"""

import difflib
import os
import pathlib

from tvq_pod.errors import UserError

_PACKAGE = pathlib.Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # in a wheel, and in a clone


def bundled() -> dict[str, pathlib.Path]:
    """The files of the bundled configs, by name, in alphabetical order."""
    folder = next(filter(pathlib.Path.is_dir, _FOLDERS), None)
    return {path.stem: path for path in sorted(folder.glob("*.py"))} if folder else {}


def config_path(config: str) -> str:
    """The value of --config, with a bundled config's name replaced by the path of its file.

    config: NAME, configs/NAME.py, or PATH, perhaps with an argument for its get_config, as in PATH:ARGUMENT. A file
    that exists is used, whatever its name. Raises UserError for a name that no bundled config has.
    """
    path, colon, argument = config.partition(":")
    if os.path.isfile(path) or argument.startswith("//"):  # gs://
        return config
    found = bundled()
    folder, name = os.path.split(path)
    if folder == "configs" and name.endswith(".py"):  # a path as in a clone: the same command works without one
        name = name.removesuffix(".py")
    elif folder or not name or name.endswith(".py"):
        return config
    if name in found and not colon:
        return str(found[name])
    if name in found:
        raise UserError(f"--config={config}: bundled configs take no argument; give --config={path}")
    near = difflib.get_close_matches(name, found, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--config={config}: is not a file or a bundled config{meant} (bundled configs: {', '.join(found)})"
    )
