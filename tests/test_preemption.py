"""SIGTERM, in a process that does nothing else: it ends in time, whoever listens."""

import os
import signal
import subprocess
import sys

import pytest

from tests.test_cli import ROOT

PROGRAM = """
import sys, time
from tvq_pod.preemption import Preemption
preemption = Preemption(float(sys.argv[1]))
preemption.can_save = sys.argv[2] == "can_save"
print("up", flush=True)
while not (sys.argv[3] == "saves" and preemption.requested):
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(75)
"""


def start(grace: float, can_save: str, does: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(grace), can_save, does],
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize(
    ("grace", "can_save", "does", "signals", "code", "said"),
    [
        (60, "can_save", "saves", 1, 75, "SIGTERM: saves and ends"),
        (60, "nothing", "hangs", 1, 75, "there is nothing to save"),
        (60, "can_save", "hangs", 2, 1, "a second SIGTERM: ends without saving"),
        (0.2, "can_save", "hangs", 1, 1, "not saved within config.checkpoint.grace_seconds=0.2 of SIGTERM"),
    ],
)
def test_how_a_process_ends(grace, can_save, does, signals, code, said, listens):
    process = start(grace, can_save, does)
    if not listens:
        process.stderr.close()
    process.send_signal(signal.SIGTERM)
    if signals == 2:
        if listens:
            assert "saves and ends" in process.stderr.readline()
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == code
    if listens:
        assert said in process.stderr.read()
