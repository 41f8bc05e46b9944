"""Several processes, one program: how they join, and how one of them acts for all.

Every process runs the same code and holds its devices' part of the global arrays. Files are written by process 0.
"""

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from tvq_pod.errors import UserError


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None, multihost: bool) -> None:
    """Joins the other processes of the job, before anything else is asked of jax; alone, if nothing is given.

    multihost: Cloud TPU, Slurm or Open MPI say who the others are. Raises UserError if the job can't be joined: a
    process that went on by itself would be one of many, each training and writing alone.
    """
    given = dict(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if multihost and len(missing) < 3:
        raise UserError("--multihost: finds the other processes by itself; leave --coordinator_address and others out")
    if not multihost and len(missing) == 3:
        return
    if not multihost and missing:
        raise UserError(f"{missing[0]}=: must be given with the others of --{', --'.join(given)}")
    if not multihost and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: must be 0 .. {num_processes - 1}, below --num_processes")
    how = "--multihost" if multihost else f"--coordinator_address={coordinator_address}"
    try:
        jax.distributed.initialize(**({} if multihost else given))
        jax.devices()  # meets the others
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{how}: this process could not join the others ({said}); all must be started") from error


def check_slices(slices: int) -> None:
    """Raises UserError if the environment speaks of another number of slices than the config: variables that an earlier
    job left behind would have this one wait for slices that are not there."""
    there = os.environ.get("MEGASCALE_NUM_SLICES")
    left = sorted(name for name in os.environ if name.startswith("MEGASCALE_"))
    if left and (there or "1") != str(slices):
        raise UserError(
            f"config.mesh.slices={slices}: contradicts MEGASCALE_NUM_SLICES={there or ''} of the environment; "
            f"give config.mesh.slices={there or 1}, or unset {', '.join(left)}"
        )


def is_first() -> bool:
    """Whether this is process 0, which writes."""
    return jax.process_index() == 0


def decided_by_first(value: bool) -> bool:
    """Process 0's value, on all of them: files may look different from host to host."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value))) if jax.process_count() > 1 else value


def on_first(function: Callable[[], None]) -> None:
    """Calls function on process 0, while the others wait. Raises what it raised there, and UserError on the others."""
    error = None
    if is_first():
        try:
            function()
        except Exception as raised:
            error = raised
    succeeded = decided_by_first(error is None)
    if error is not None:
        raise error
    if not succeeded:
        raise UserError("process 0 could not go on; its own line says why")
