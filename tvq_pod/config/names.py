"""The names of settings, and messages about names that do not exist."""

import dataclasses
import difflib
from collections.abc import Iterable

from tvq_pod.config.settings import NOT_IN_CONFIG, Settings
from tvq_pod.errors import UserError


def _groups(cls: type, path: str) -> dict[str, tuple[str, ...]]:
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in NOT_IN_CONFIG}
    groups = {path: tuple(fields)}
    for name, default in fields.items():
        if dataclasses.is_dataclass(default):
            groups |= _groups(type(default), f"{path}.{name}")
    return groups


GROUPS = _groups(Settings, "config")  # names of settings and groups, by the path of their group


# Old names of settings, and their current names; a group's old name stands for all of its settings.
RENAMED = {
    "config.sanity.bad_steps": "config.bad_steps.rollback_after",
    "config.sanity": "config.bad_steps",
    "config.sample.nucleus_p": "config.sample.top_p",
}


def current_name(path: str) -> str | None:
    """The current name of a renamed setting or group; None for others."""
    for old, new in RENAMED.items():
        if path == old or path.startswith(f"{old}."):
            return new + path.removeprefix(old)
    return None


def with_current_names(tree: dict) -> dict:
    """Settings as nested dicts, from the config.json of any version, under their current names.

    A setting that has both names keeps both, so that nothing chooses between them.
    """
    renamed = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for group, values in tree.items():
        if not isinstance(values, dict):
            continue
        for name, value in values.items():
            if new := current_name(f"config.{group}.{name}"):
                _, new_group, new_name = new.split(".")
                others = renamed.setdefault(new_group, {})
                if isinstance(others, dict) and new_name not in others:
                    others[new_name] = value
                    del renamed[group][name]
        if current_name(f"config.{group}") and not renamed[group]:
            del renamed[group]
    return renamed


def check_name(path: str, value: str | None = None) -> None:
    """Raises UserError if there is no such setting or group of settings. path: for example config.model.d_model."""
    if not _is_name(path):
        raise UserError(unknown(path, value))


def unknown(path: str, value: str | None = None) -> str:
    """A message about a name that is not a setting: its current name, or the nearest names that exist."""
    here = path if value is None else f"{path}={value}"
    if new := current_name(path):
        if _is_name(new):
            inside = [f"{old} is called {now} now" for old, now in RENAMED.items() if old.startswith(f"{path}.")]
            return "; ".join([f"{here}: is called {new} now", *inside])
        path = new  # a renamed group that never had this setting
    *parts, last = path.split(".")
    group, rest = parts[0], [*parts[1:], last]
    while f"{group}.{rest[0]}" in GROUPS:
        group = f"{group}.{rest.pop(0)}"
    if rest[0] in GROUPS[group]:  # a setting, followed by something else
        return f"{here}: is not a setting; did you mean {group}.{rest[0]}?"
    near = [*_elsewhere(".".join(parts), last), *_within(group, rest)]
    if not near:
        return f"{here}: is not a setting; {group} has {', '.join(GROUPS[group])}"
    near = [name for name in dict.fromkeys(near) if not any(other.startswith(f"{name}.") for other in near)]
    return f"{here}: is not a setting; did you mean {' or '.join(near)}?"


def _is_name(path: str) -> bool:
    group, _, name = path.rpartition(".")
    return path in GROUPS or name in GROUPS.get(group, ())


def _within(group: str, names: list[str]) -> list[str]:
    """The setting or group in a group whose name is nearest to a path; none if none is near."""
    close = _closest(names[0], GROUPS[group])
    if close is None:
        return []
    path = f"{group}.{close}"
    return (len(names) > 1 and path in GROUPS and _within(path, names[1:])) or [path]


def _elsewhere(group: str, name: str) -> list[str]:
    """The setting of exactly this name in the group with the nearest name; none if no group has one."""
    groups = [path for path, names in GROUPS.items() if name in names and f"{path}.{name}" not in GROUPS]
    return [f"{path}.{name}" for path in sorted(groups, key=lambda path: -_likeness(path, group))[:1]]


def _closest(name: str, known: Iterable[str]) -> str | None:
    best = max(known, key=lambda other: _likeness(name, other))
    return best if _likeness(name, best) >= 0.5 else None


def _likeness(one: str, other: str) -> float:
    one, other = (name.lower().replace("-", "_") for name in (one, other))
    return difflib.SequenceMatcher(None, one, other).ratio()
