"""Formats a run for the terminal: its status file (tvq_pod/run/status.py) in a line, and a row of the table of all
runs."""

import contextlib
import time

from tvq_pod.errors import UserError
from tvq_pod.run.goodput_table import table

from .clock import ago
from .gcloud import GcloudError
from .machines import Machines

HEADS = ("run", "slice", "queue", "training", "step", "tokens/s", "MFU", "loss", "goodput", "saved")


def progress(status: dict | None) -> str:
    """Formats a run's status file in one line."""
    if not status:
        return "running; no status yet"
    return (
        f"{status['state']}, step {status.get('step', 0)}/{status.get('num_steps', '?')}, "
        f"loss {_number(status, 'loss', '.4f')}, {_number(status, 'tokens_per_second', ',.0f')} tokens/s, "
        f"saved step {_number(status, 'saved_step', 'd')}"
    )


def goodput(status: dict | None) -> str:
    """Returns a table of where the run's time went; "" if the file does not have it, or is damaged."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        return table(_record(status or {}))
    return ""


def row(machines: Machines, status: dict | None) -> tuple[str, ...]:
    """Returns a cell for each of HEADS. status: the run's."""
    record = machines.record
    what = f"{record.slices}x{record.accelerator}" if record.slices > 1 else record.accelerator
    try:
        queue = machines.queue().state.lower()
    except UserError as error:
        queue = error.kind if isinstance(error, GcloudError) else "not ours"
    status = status or {}
    training, saved = status.get("state", "-"), "-"
    if training == "training":
        training += f" ({_since(status['time'])} ago)"
    if status.get("saved_step") is not None:
        saved = f"step {status['saved_step']}, {_since(status['saved_at'])} ago"
    return (
        record.name,
        what + (" spot" if record.spot else ""),
        queue,
        training,
        f"{status['step']}/{status['num_steps']}" if "step" in status else "-",
        _number(status, "tokens_per_second", ",.0f"),
        _number(status, "mfu", ".1%"),
        _number(status, "loss", ".4f"),
        _number(_record(status), "goodput", ".1%"),
        saved,
    )


def _record(status: dict) -> dict:
    """Returns the part about where the time went; empty if it is missing or damaged."""
    found = status.get("goodput")
    return found if isinstance(found, dict) else {}


def _number(status: dict, name: str, form: str) -> str:
    return "-" if status.get(name) is None else format(status[name], form)


def _since(at: float) -> str:
    return ago(max(0.0, time.time() - at))
