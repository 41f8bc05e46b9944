"""The values that a setting may have: names for types with bounds, and messages for values that a type does not allow.

The type hint of a setting states all of it: `Literal` gives choices, `Annotated` with the marks below gives bounds.
"""

import dataclasses
import operator
import types
import typing
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt


@dataclasses.dataclass(frozen=True)
class Except:
    """A mark for Annotated: one value that is refused although it is within the bounds, and what it must be instead."""

    value: int
    remedy: str


PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
FloatType = Literal["float32", "bfloat16"] | type  # a name, as in a config file; code may also give a jnp dtype

COMPARISONS = {
    Ge: (operator.ge, "at least"),
    Gt: (operator.gt, "above"),
    Le: (operator.le, "at most"),
    Lt: (operator.lt, "below"),
    Except: (operator.ne, "not"),
}
Bound = Ge | Gt | Le | Lt | Except


def must_be(hint: object, value: object) -> str:
    """Says what a setting's type hint requires, as "at least 1", if it does not allow a value; "" if it does.

    Choices and bounds are checked, the type itself is not. Of several bounds, those that the value breaks come first.
    """
    if (known := choices(hint)) and value not in known:
        return f"one of {', '.join(map(str, known))}"
    broken = [bound for bound in bounds(hint) if not _holds(bound, value)]
    if not broken:
        return ""
    if isinstance(broken[0], Except):
        return broken[0].remedy
    return " and ".join(words(bound) for bound in dict.fromkeys([*broken, *bounds(hint)]))


def choices(hint: object) -> tuple:
    """The values of the Literal in a type hint, which may be in a union or annotated; () if there is none."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (Annotated, typing.Union, types.UnionType):
        return tuple(choice for inner in typing.get_args(hint) for choice in choices(inner))
    return ()


def bounds(hint: object) -> list[Bound]:
    """The bounds of an annotated type, in order; [] if there are none."""
    return [mark for mark in getattr(hint, "__metadata__", ()) if type(mark) in COMPARISONS]


def words(bound: Bound) -> str:
    """A bound in words: "at least 1"."""
    limit = limit_of(bound)
    if isinstance(limit, int) and limit > 2**16 and limit.bit_count() == 1:
        limit = f"2 ** {limit.bit_length() - 1}"
    return f"{COMPARISONS[type(bound)][1]} {limit}"


def limit_of(bound: Bound) -> int | float:
    """The number of a bound: 1 of Ge(1)."""
    limit = getattr(bound, dataclasses.fields(bound)[0].name)
    assert isinstance(limit, int | float)
    return limit


def _holds(bound: Bound, value: object) -> bool:
    return COMPARISONS[type(bound)][0](value, limit_of(bound))
