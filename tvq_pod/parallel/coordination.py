"""jax's coordination service, by which the processes of a job exchange short texts without the devices.

jax.experimental.multihost_utils is built on it; jax has no public name for it.
"""

from typing import Protocol, cast

from jax._src import distributed

CHECKED_WITH = {"jax": "0.10.2"}


class Client(Protocol):
    """The methods of its client that are used here. All raise jax.errors.JaxRuntimeError."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Sets a key. Raises, with ALREADY_EXISTS in its text, if the key exists; unless allow_overwrite."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns all keys that begin with `key`, with their values."""
        ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Waits until the key exists. Raises with DEADLINE_EXCEEDED in its text if that takes too long."""
        ...

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        """Waits until all processes have called it."""
        ...


def client() -> Client | None:
    """Returns the client, or None in a job of one process."""
    return cast(Client | None, distributed.global_state.client)


def process_index() -> int:
    """Returns jax.process_index() without starting the devices' runtime, which that function may do."""
    return distributed.global_state.process_id
