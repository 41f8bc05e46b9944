"""The command line as a user has it: real processes, their exit codes and their last words."""

import json
import os
import pathlib
import signal
import subprocess
import sys

from tests import forked

ROOT = pathlib.Path(__file__).parents[1]
SMALL = """
from tvq_pod.config import default_config

def get_config():
    config = default_config()
    config.data.source = {source!r}
    config.data.validation_share = config.data.test_share = 0.2
    model = config.model
    model.d_model, model.d_k, model.d_v, model.n_code, model.n_layer = 16, 8, 16, 8, 1
    model.block_len = model.mem_len = 8
    model.head_type = "mqa"  # one unit of attention a layer, where shga has two to trace and compile
    config.train.batch_size, config.train.update_len, config.train.num_steps = 8, 32, 40
    config.train.log_every_steps = 5
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 5, 0.01
    config.checkpoint.every_steps = 20
    config.eval.batch_size = 8
    config.sample.length = 20
    return config
"""


def environment(devices=1):
    """A user's environment, but for quick compilation (see conftest.py)."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "host_platform_device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(flags), PYTHONPATH=str(ROOT))


def start(*flags, devices=1, prefix=()) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-m", "tvq_pod.main", *map(str, flags)]
    return forked.Popen(
        command, env=environment(devices), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def said_until(process: subprocess.Popen, beginning: str) -> list[str]:
    """The messages of a process, until it has ended; when one begins so, the process gets SIGTERM."""
    lines = []
    assert process.stderr
    for line in process.stderr:
        lines.append(line)
        if line.startswith(beginning):
            process.send_signal(signal.SIGTERM)
    return lines


def run(*flags, devices=1) -> tuple[str, str]:
    """Output and messages of a command that must succeed."""
    code, out, err = finish(start(*flags, devices=devices))
    assert code == 0, err
    return out, err


def metrics_of(workdir, split):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def fingerprint(inspected: str) -> list[str]:
    """The lines by which two runs are compared."""
    lines = [line for line in inspected.splitlines() if "sha256" in line]
    assert len(lines) == 2
    return lines


def packages_of(workdir):
    return [json.loads(line) for line in (workdir / "packages.jsonl").read_text().splitlines()]


def contents(workdir: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Every file of a run but its lock, with what is in it."""
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock"}
