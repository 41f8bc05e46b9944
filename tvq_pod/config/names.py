"""Names of settings: which there are, and what to say of one that is not there."""

import dataclasses
import difflib
from collections.abc import Iterable

from tvq_pod.config.settings import NOT_IN_CONFIG, Settings
from tvq_pod.errors import UserError


def _groups(cls, path: str) -> dict[str, tuple[str, ...]]:
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in NOT_IN_CONFIG}
    groups = {path: tuple(fields)}
    for name, default in fields.items():
        if dataclasses.is_dataclass(default):
            groups |= _groups(type(default), f"{path}.{name}")
    return groups


GROUPS = _groups(Settings, "config")  # names of settings and groups, by the path of the group that they are in


# Settings by the names that older versions gave them, and those that they have now; of a group, all of its settings.
RENAMED = {
    "config.sanity.bad_steps": "config.bad_steps.rollback_after",
    "config.sanity": "config.bad_steps",
    "config.sample.nucleus_p": "config.sample.top_p",
}


def name_now(path: str) -> str | None:
    """The name of today of a setting or group that was renamed; None for others."""
    for old, new in RENAMED.items():
        if path == old or path.startswith(f"{old}."):
            return new + path.removeprefix(old)
    return None


def with_names_of_now(tree: dict) -> dict:
    """A config.json of an older version, as nested dicts, with its settings under the names of today."""
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for group, names in list(tree.items()):
        for name in list(names) if isinstance(names, dict) else []:
            if now := name_now(f"config.{group}.{name}"):
                _, new_group, new_name = now.split(".")
                tree.setdefault(new_group, {})[new_name] = tree[group].pop(name)
        if name_now(f"config.{group}"):
            del tree[group]
    return tree


def check_name(path: str, value: str | None = None) -> None:
    """Raises UserError if there is no such setting or group of settings. path: as config.model.d_model."""
    group, _, name = path.rpartition(".")
    if path not in GROUPS and name not in GROUPS.get(group, ()):
        raise UserError(unknown(path, value))


def unknown(path: str, value: str | None = None) -> str:
    """What to say of a name that is not a setting: the nearest names that there are."""
    here = path if value is None else f"{path}={value}"
    if now := name_now(path):
        return f"{here}: is called {now} now"
    *parts, last = path.split(".")
    group, rest = parts[0], [*parts[1:], last]
    while f"{group}.{rest[0]}" in GROUPS:
        group = f"{group}.{rest.pop(0)}"
    if rest[0] in GROUPS[group]:  # a setting, with something behind it
        return f"{here}: is not a setting; did you mean {group}.{rest[0]}?"
    near = [*_elsewhere(".".join(parts), last), *_within(group, rest)]
    if not near:
        return f"{here}: is not a setting; {group} has {', '.join(GROUPS[group])}"
    near = [name for name in dict.fromkeys(near) if not any(other.startswith(f"{name}.") for other in near)]
    return f"{here}: is not a setting; did you mean {' or '.join(near)}?"


def _within(group: str, names: list[str]) -> list[str]:
    """The setting or group of a group that is nearest to a path in it; none if none is near."""
    close = _closest(names[0], GROUPS[group])
    if close is None:
        return []
    path = f"{group}.{close}"
    return (len(names) > 1 and path in GROUPS and _within(path, names[1:])) or [path]


def _elsewhere(group: str, name: str) -> list[str]:
    """The setting of that very name in the group of the nearest name; none if no group has one."""
    groups = [path for path, names in GROUPS.items() if name in names and f"{path}.{name}" not in GROUPS]
    return [f"{path}.{name}" for path in sorted(groups, key=lambda path: -_likeness(path, group))[:1]]


def _closest(name: str, known: Iterable[str]) -> str | None:
    best = max(known, key=lambda other: _likeness(name, other))
    return best if _likeness(name, best) >= 0.5 else None


def _likeness(one: str, other: str) -> float:
    one, other = (name.lower().replace("-", "_") for name in (one, other))
    return difflib.SequenceMatcher(None, one, other).ratio()
