"""Runs a multi-process job on one machine, with simulated devices, as on a pod, before you rent one.

    python -m launch.local --processes=2 --devices_per_process=4 -- --config=configs/stdlib.py --workdir=runs/two

The arguments after -- go to `python -m tvq_pod.main`, once for each process. Process 0's output is shown unchanged, the
others' with their number in front. If one process fails, the others are ended, and its exit code is the launcher's; a
signal counts as 128 + its number. Signals that ask a run to save or to end are passed on.
"""

import functools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, BinaryIO

from absl import app, flags

_PROCESSES = flags.DEFINE_integer("processes", 2, "The number of processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices_per_process", 4, "Simulated devices of each process.", lower_bound=1)
_GRACE = flags.DEFINE_float("grace_seconds", 30.0, "How long the others may take to end after one failed.")


def free_port() -> int:
    """Returns a port of this machine that is currently free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(n_processes: int, devices_per_process: int, arguments: list[str], **settings) -> list[subprocess.Popen]:
    """Starts the processes of one job, with piped output. settings: arguments of Popen."""
    address = f"127.0.0.1:{free_port()}"
    given = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    given.append(f"--xla_force_host_platform_device_count={devices_per_process}")
    environment = os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(given))
    job = [f"--coordinator_address={address}", f"--num_processes={n_processes}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tvq_pod.main", *arguments, *job, f"--process_id={index}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **settings,
        )
        for index in range(n_processes)
    ]


def wait(processes: list[subprocess.Popen], grace_seconds: float) -> int:
    """Waits until all are done, or one has failed and the others were ended. Returns the exit code of the first
    failure, or 0."""
    ended = queue.SimpleQueue()
    for process in processes:
        in_background(lambda process=process: ended.put(process.wait()))
    for _ in processes:
        code = ended.get()
        if code:
            _end([process for process in processes if process.poll() is None], grace_seconds)
            return 128 - code if code < 0 else code
    return 0


def _end(processes: list[subprocess.Popen], grace_seconds: float) -> None:
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def in_background(function: Callable[[], object]) -> threading.Thread:
    """Calls the function in a thread that does not keep the process alive."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def _copy(source: IO[bytes], target: BinaryIO, prefix: bytes) -> None:
    for line in source:
        target.write(prefix + line)
        target.flush()


def main(argv: list[str]) -> None:
    """argv: the program, then the flags of tvq_pod.main."""
    # In their own group: a terminal's Ctrl-C reaches only the launcher, which passes it on, so each process gets it
    # once.
    processes = start(_PROCESSES.value, _DEVICES.value, argv[1:], process_group=0)

    def pass_on(number, _frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup makes both the launcher and the processes ignore it
            signal.signal(number, pass_on)
    readers = []
    for index, process in enumerate(processes):
        prefix = f"[{index}] ".encode() if index else b""
        for source, target in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            assert source is not None, "it is a pipe"
            readers.append(in_background(functools.partial(_copy, source, target, prefix)))
    code = wait(processes, _GRACE.value)
    for reader in readers:
        reader.join()
    sys.exit(code)


if __name__ == "__main__":
    app.run(main)
