"""The parts of the train state that a checkpoint has, and their names: the one place that knows them.

params       the parameters, codebooks included: all that eval and sample need
train        step, opt_state, digest of the tokens consumed, and the statistics for bad steps, under their old name
recurrent    every layer's recurrent state, for every stream
ema          the moving average of the parameters, if the run keeps one
"""

from typing import Any, Protocol, Self, TypeVar

import jax

SAVED_AS = {"bad_steps": "sanity"}  # fields of the state that have another name in a checkpoint
IN_TRAIN = ("step", "opt_state", "bad_steps", "digest")


class State(Protocol):
    """A state that can be saved: a TrainState, or any dataclass of pytrees with these fields."""

    @property
    def step(self) -> jax.Array: ...
    @property
    def params(self) -> dict: ...
    @property
    def opt_state(self) -> Any: ...
    @property
    def recurrent(self) -> dict | None: ...
    @property
    def bad_steps(self) -> dict: ...
    @property
    def digest(self) -> jax.Array: ...
    @property
    def ema(self) -> dict | None: ...

    def replace(self, **changes) -> Self: ...


S = TypeVar("S", bound=State)


def saved_name(field: str) -> str:
    """The name of a field of the state in a checkpoint."""
    return SAVED_AS.get(field, field)


def train_item(state: State) -> dict:
    """The item `train` of a checkpoint, of arrays or of their descriptions."""
    return {saved_name(field): getattr(state, field) for field in IN_TRAIN}


def from_items(abstract: S, params: dict, train: dict, recurrent: dict | None, ema: dict | None) -> S:
    """A state like `abstract`, made from the items that were read."""
    fields = {field: train[saved_name(field)] for field in IN_TRAIN}
    return abstract.replace(params=params, recurrent=recurrent, ema=ema, **fields)
