"""Choices and bounds stand in the type hints of settings, and are held."""

import math
import typing
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt

from tests.settings_docs import group_of
from tvq_pod.config import default_config, resolve
from tvq_pod.config.bounds import Except, bounds, choices, limit_of, must_be
from tvq_pod.config.names import GROUPS
from tvq_pod.errors import UserError

HINTS = {
    f"{path}.{name}": hint
    for path in GROUPS
    for name, hint in typing.get_type_hints(type(group_of(path)), include_extras=True).items()
    if name in GROUPS[path] and f"{path}.{name}" not in GROUPS
}


@pytest.mark.parametrize(
    ("hint", "allowed", "refused"),
    [
        (int, [-7, 0], {}),
        (Annotated[int, "text"], [-7, 0], {}),
        (Annotated[int, Ge(1)], [1, 2], {0: "at least 1", -3: "at least 1"}),
        (Annotated[float, Gt(0), Le(1)], [1e-9, 1.0], {0.0: "above 0 and at most 1", 1.1: "at most 1 and above 0"}),
        (Annotated[float, Ge(0), Lt(1)], [0.0, 0.99], {1.0: "below 1 and at least 0", -1.0: "at least 0 and below 1"}),
        (Annotated[float, Ge(0), Le(1)], [0.0, 1.0], {math.nan: "at least 0 and at most 1"}),
        (Annotated[int, Lt(2**31)], [2**31 - 1], {2**31: "below 2 ** 31"}),
        (Annotated[int, Ge(-1), Except(0, "1, or -1")], [-1, 1], {0: "1, or -1", -2: "at least -1 and not 0"}),
        (Literal["on", "off"], ["on", "off"], {"of": "one of on, off"}),
        (Literal["a", "b"] | type, ["a"], {"c": "one of a, b"}),
        (Annotated[Literal[1, 2], "text"], [1, 2], {3: "one of 1, 2"}),
    ],
)  # fmt: skip
def test_what_a_type_hint_does_not_allow_is_told_with_what_it_does(hint, allowed, refused):
    assert [must_be(hint, value) for value in allowed] == [""] * len(allowed)
    assert {value: must_be(hint, value) for value in refused} == refused


@pytest.mark.parametrize("path", HINTS)
def test_every_number_states_its_least_value_and_every_default_is_allowed(path):
    group, _, name = path.rpartition(".")
    hint, default = HINTS[path], getattr(group_of(group), name)
    assert must_be(hint, default) == ""
    if type(default) in (int, float):
        assert isinstance(bounds(hint)[0], Ge | Gt), "state a bound in its type hint, as PositiveInt does"
    else:
        assert bounds(hint) == []
        assert default in choices(hint) or not choices(hint)


def neighbors(bound, kind):
    """The number of a bound, and the next ones below and above it."""
    limit = kind(limit_of(bound))
    if kind is int:
        return limit - 1, limit, limit + 1
    return math.nextafter(limit, -math.inf), limit, math.nextafter(limit, math.inf)


@pytest.mark.parametrize("path", [path for path, hint in HINTS.items() if bounds(hint) or choices(hint)])
def test_resolve_refuses_what_a_type_hint_does_not_allow_by_its_name(path):
    hint, config, name = HINTS[path], default_config(), path.removeprefix("config.")
    tried: list = ["nonsense"] if choices(hint) else []
    for bound in bounds(hint):
        tried += neighbors(bound, type(config[name]))
    wrong = {value: must_be(hint, value) for value in tried if must_be(hint, value)}
    assert len(wrong) >= len(bounds(hint)) + bool(choices(hint))
    for value, expected in wrong.items():
        config.update_from_flattened_dict({name: value})
        with pytest.raises(UserError) as error:
            resolve(config)
        assert str(error.value) == f"{path}={value}: must be {expected}"
