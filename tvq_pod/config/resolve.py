"""Turns a config file into settings, and checks them.

`default_config()` turns the dataclasses of settings.py into the ml_collections ConfigDict that every file in configs/
starts from; `resolve()` turns a ConfigDict, overrides included, back into them.
"""

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, TypeVar

import ml_collections

from tvq_pod.config.bounds import must_be
from tvq_pod.config.names import GROUPS, unknown
from tvq_pod.config.relations import check_relations
from tvq_pod.config.settings import NOT_IN_CONFIG, Settings
from tvq_pod.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Group = TypeVar("Group", bound="DataclassInstance")


class UnknownSettingError(UserError, KeyError):
    """An error for a name that is not a setting. It is a KeyError, too, since ml_collections expects one."""

    __str__ = UserError.__str__


class Config(ml_collections.ConfigDict):
    """The ConfigDict of a config file. A name that it does not have is refused with its full path and the nearest
    setting that exists; so is a value of another type."""

    if TYPE_CHECKING:  # config files read and write groups and settings as attributes, whatever their types

        def __getattr__(self, attribute: str) -> Any: ...

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except UnknownSettingError:
            raise
        except KeyError:
            raise self._unknown(key) from None

    def __setitem__(self, key, value):
        if self.is_locked and key not in self:
            raise self._unknown(key)
        try:
            super().__setitem__(key, value)
        except TypeError:
            kind = kind_name(type(self[key]))
            raise UserError(f"{self._path()}.{key}={value!r}: must be {kind}") from None

    def _unknown(self, key) -> UnknownSettingError:
        return UnknownSettingError(unknown(f"{self._path()}.{key}"))

    def _path(self) -> str:
        """The path of this group. Each group has names of its own, so they identify it, even in a copy."""
        own = set(self.keys())
        return next((path for path, names in GROUPS.items() if own == set(names)), "config")


def default_config() -> Config:
    """A locked ConfigDict with every setting at its default. Files in configs/ change values, never add names."""
    return config_of(Settings())


def config_of(settings: Settings) -> Config:
    """Returns settings as a locked ConfigDict."""
    tree = tree_of(settings)
    config = Config({name: Config(value) if isinstance(value, dict) else value for name, value in tree.items()})
    config.lock()
    return config


def tree_of(settings: Settings) -> dict:
    """Returns settings as nested dicts, as in config files and config.json."""
    tree = dataclasses.asdict(settings)
    for name in NOT_IN_CONFIG:
        del tree["model"][name]
    return tree


def resolve(config: ml_collections.ConfigDict) -> Settings:
    """Turns a ConfigDict into Settings. Raises UserError, naming the setting, for values that no machine could run."""
    settings = build(Settings, config.to_dict(), "config")
    _check_values(settings, "config")
    check_relations(settings)
    return settings


def build(cls: type[Group], tree: dict, path: str) -> Group:
    """Makes a dataclass from a dict that must have exactly its fields, with their types. Choices and bounds are not
    checked.

    path: the group's name, for errors. Raises UserError.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in NOT_IN_CONFIG}
    for name in tree:
        if name not in fields:
            raise UserError(unknown(f"{path}.{name}"))
    values = {}
    for name, field in fields.items():
        here = f"{path}.{name}"
        if name not in tree:
            raise UserError(f"{here}: is missing; start the config from tvq_pod.config.default_config()")
        value, kind = tree[name], type(field.default)
        if dataclasses.is_dataclass(kind):
            if type(value) is not dict:
                raise UserError(f"{here}={value!r}: must be {kind_name(dict)}")
            value = build(kind, value, here)
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{here}={value!r}: must be {kind_name(kind)}")
        values[name] = value
    return cls(**values)


def _check_values(group: "DataclassInstance", path: str) -> None:
    """Raises UserError for the first value in a group of settings that its type hint does not allow."""
    for name, hint in typing.get_type_hints(type(group), include_extras=True).items():
        value = getattr(group, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _check_values(value, f"{path}.{name}")
        elif problem := must_be(hint, value):
            raise UserError(f"{path}.{name}={value}: must be {problem}")


def kind_name(kind: type) -> str:
    """The type of a setting, in words."""
    if issubclass(kind, dict | ml_collections.ConfigDict):
        return "a group of settings"
    return {int: "an integer", float: "a number", bool: "True or False", str: "text"}.get(kind, kind.__name__)
