"""The command line before absl reads it: which settings it overrides, and which config it names."""

import pathlib
import re

from tvq_pod.config.bundled import config_path
from tvq_pod.config.run_config import FROM


def overrides_of(argv: list[str]) -> dict[str, str | None]:
    """The settings given as flags, {config.NAME: value}; None where the value is the next argument or missing."""
    given = {}
    for argument in argv[1:]:
        name, equals, value = argument.partition("=")
        if argument == "--":
            break
        if match := re.fullmatch(r"--?(?:no)?(config\..*)", name, re.DOTALL):
            given[match[1]] = value if equals else None
    return given


def with_config(argv: list[str]) -> list[str]:
    """The command line with the path of a bundled config in place of its name (see bundled.py). If no config is given,
    the run's own config is added, or that of a model to import, so that it can be overridden like any other. Raises
    UserError."""
    is_import = given(argv, "mode") == "import"
    config, folder = given(argv, "config"), given(argv, "from" if is_import else "workdir")
    if config is not None:
        return _with_paths(argv)
    if folder is None:
        return argv
    if is_import:
        folder = f"{FROM}{folder}"
    return [argv[0], f"--config={pathlib.Path(__file__).with_name('run_config.py')}:{folder}", *argv[1:]]


def _with_paths(argv: list[str]) -> list[str]:
    """The command line with a file's path in place of each config's name, as in --config=NAME or --config NAME."""
    found, is_value = list(argv), False
    for place, argument in enumerate(argv):
        flag, equals, value = argument.lstrip("-").partition("=")
        if is_value:
            found[place] = config_path(argument)
        is_flag = argument.startswith("-") and flag == "config" and not is_value
        if is_flag and equals:
            found[place] = f"--config={config_path(value)}"
        is_value = is_flag and not equals
    return found


def without(names: tuple[str, ...], argv: list[str]) -> list[str]:
    """The command line without some flags, given as --name=value or as --name value."""
    kept, skip = [], False
    for argument in argv:
        flag, equals, _ = argument.lstrip("-").partition("=")
        is_dropped = argument.startswith("-") and flag in names
        if not (skip or is_dropped):
            kept.append(argument)
        skip = is_dropped and not equals
    return kept


def given(argv: list[str], name: str) -> str | None:
    """The value of a flag, before absl has read it."""
    found = None  # of several, absl takes the last
    for place, argument in enumerate(argv):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            found = value if equals else [*argv, ""][place + 1]
    return found
