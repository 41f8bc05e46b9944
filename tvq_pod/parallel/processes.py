"""Several processes of one program: joining them, and letting one act for all.

Every process runs the same code and holds its devices' part of the global arrays. Process 0 writes the files.
"""

import os
import re
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tvq_pod.errors import UserError
from tvq_pod.host.terminal import silence, tell
from tvq_pod.parallel import deadlines
from tvq_pod.parallel.deadlines import waiting
from tvq_pod.parallel.sharding import replicated


def join(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    multihost: bool,
    peer_timeout_seconds: int = 100,
    join_timeout_seconds: int = 300,
    wait_timeout_seconds: int = 1800,
) -> None:
    """Joins the other processes of the job, before any other call to jax; stays alone if nothing is given.

    multihost: whether Cloud TPU, Slurm or Open MPI tell which the others are. peer_timeout_seconds: a process that has
    not been heard of for this long is dead, and jax ends all others, with a message and SIGABRT. Raises UserError if
    the job can't be joined, and ends the process after join_timeout_seconds: a process that continued alone would be
    one of many, each training and writing by itself. wait_timeout_seconds: how long a process waits for the others
    after joining (see `waiting`).
    """
    deadlines.set_wait_timeout(wait_timeout_seconds)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from preemption.py
    given = dict(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if multihost:
        if len(missing) < 3:
            raise UserError(
                "--multihost: finds the other processes by itself; leave out --coordinator_address and the others"
            )
        how = "--multihost"
    else:
        if len(missing) == 3:
            return
        if coordinator_address is None or num_processes is None or process_id is None:
            raise UserError(f"{missing[0]}=: must be given with the others of --{', --'.join(given)}")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id}: must be 0 .. {num_processes - 1}, below --num_processes")
        how = f"--coordinator_address={coordinator_address}"
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):[0-9]{1,5}", coordinator_address):
            raise UserError(f"{how}: must be HOST:PORT of process 0")
    # jax itself would wait equally long and then abort with a page of C++.
    alarm = threading.Timer(join_timeout_seconds, _end_alone, [how, join_timeout_seconds])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator_address,  # this and the next two arguments are None with multihost
            num_processes,
            process_id,
            heartbeat_timeout_seconds=peer_timeout_seconds,
            initialization_timeout=join_timeout_seconds + 60,
        )
        if jax.process_index():
            silence()
        jax.devices()  # connects to the others
        all_agree(True)  # sets up collectives now: later, a process may wait for longer than the setup allows
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{how}: this process could not join the others ({said}); start all of them") from error
    finally:
        alarm.cancel()


def _end_alone(how: str, seconds: int) -> None:
    tell(
        f"error: {how}: this process could not join the others within --join_timeout_seconds={seconds}; start all of "
        "them where they can reach process 0"
    )
    os._exit(1)


def check_slices(slices: int) -> None:
    """Raises UserError if the environment has another number of slices than the config: variables left by an earlier
    job would make this one wait for slices that do not exist."""
    there = os.environ.get("MEGASCALE_NUM_SLICES", "")
    left = sorted(name for name in os.environ if name.startswith("MEGASCALE_"))
    if left and there != str(slices):
        give = f"give config.mesh.slices={there}, or " if there.isdecimal() and int(there) else ""
        raise UserError(
            f"config.mesh.slices={slices}: contradicts MEGASCALE_NUM_SLICES={there} in the environment; "
            f"{give}unset {', '.join(left)}"
        )


def is_process_zero() -> bool:
    """Returns whether this is process 0, which writes files."""
    return jax.process_index() == 0


def from_process_zero(value: int) -> int:
    """Returns process 0's value on all processes: files may look different on other hosts."""
    if jax.process_count() == 1:
        return value
    with waiting("a decision of process 0"):
        return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int64)))


def decided_by_process_zero(value: bool) -> bool:
    """Returns process 0's value on all processes."""
    return bool(from_process_zero(int(value)))


def text_from_process_zero(text: str) -> str:
    """Returns process 0's text on all processes."""
    return bytes_from_process_zero(text.encode()).decode()


def bytes_from_process_zero(content: bytes) -> bytes:
    """Returns process 0's bytes on all processes."""
    if jax.process_count() == 1:
        return content
    with waiting("a message of process 0"):
        given = np.frombuffer(content, np.uint8)
        length = from_process_zero(len(given))
        own = given if is_process_zero() else np.zeros(length, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8).tobytes()


def all_agree(value: bool) -> bool:
    """Returns whether the value is True on all processes."""
    if jax.process_count() == 1:
        return value
    with waiting("an agreement of all processes"):
        return bool(multihost_utils.process_allgather(np.asarray(value)).all())


def on_process_zero(function: Callable[[], object]) -> None:
    """Calls function on process 0, while the others wait. If it raises, raises the same there, and UserError on the
    others.

    A function that may take longer than --wait_timeout_seconds calls `still_working` as it progresses.
    """
    error = None
    with waiting("the work of process 0", of_first=True):
        if is_process_zero():
            try:
                function()
            except Exception as raised:
                error = raised
        succeeded = decided_by_process_zero(error is None)
    if error is not None:
        raise error
    if not succeeded:
        raise UserError("process 0 could not continue; its own line says why")


class Votes:
    """Votes, by which all processes learn at the same step what happened to one of them. They are counted on the
    devices, so that no process ever waits for the network between steps.

    A vote that is cast before a step is dispatched is known to all once the previous step is done.
    """

    def __init__(self, mesh: jax.sharding.Mesh, names: tuple[str, ...]):
        """names: the names of the votes."""
        self._names, self._alone = names, jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._count = jax.jit(lambda votes: jnp.sum(votes, axis=0), out_shardings=replicated(mesh))
        self._shape = (mesh.size, len(names))
        self._arrays = {}  # by votes: as long as nothing happens, the same array is counted again
        self._counted = None

    def cast(self, **votes: bool) -> None:
        """Casts this process's votes, one for each name. All processes must call it alternately with `result`."""
        row = tuple(votes[name] for name in self._names)
        if self._alone:
            self._counted = np.array(row)
            return
        if row not in self._arrays:
            own = np.broadcast_to(np.array(row, np.int32), self._shape)
            self._arrays[row] = jax.make_array_from_callback(self._shape, self._sharding, lambda index: own[index])
        self._counted = self._count(self._arrays[row])

    def result(self) -> dict[str, bool]:
        """Returns, by name, whether any process cast the vote."""
        return {name: bool(n) for name, n in zip(self._names, np.asarray(self._counted), strict=True)}
