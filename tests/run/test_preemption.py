"""Signals to a process that does nothing else: it ends, or goes on, as they ask, whoever listens."""

import os
import signal
import subprocess
import sys

import pytest

from tests import forked
from tests.command import ROOT

PROGRAM = """
import os, sys, time
from tvq_pod.run.preemption import Preemption
preemption = Preemption(float(sys.argv[1]))
preemption.can_save = sys.argv[2] == "can_save"
print("up", flush=True)
while not (sys.argv[3] == "saves" and preemption.requested):
    time.sleep(0.01)
    if preemption.take_save():
        print("saved", flush=True)
        preemption.can_save = True
time.sleep(0.2)
os._exit(75)  # as main ends: Python's own way has another code where stderr is closed
"""


def _heed_signals() -> None:
    """These tests may run in the background, or under nohup, where SIGINT or SIGHUP is ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


@pytest.fixture
def start():
    started = []

    def start(grace: float, can_save: str, does: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        process = forked.Popen(
            [*prefix, sys.executable, "-c", PROGRAM, str(grace), can_save, does],
            env=os.environ | dict(PYTHONPATH=str(ROOT)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_signals if prefix else None,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow(2)
@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize(
    ("grace", "can_save", "does", "signals", "code", "said"),
    [
        (60, "can_save", "saves", [TERM], 75, "SIGTERM: the run saves a checkpoint and ends"),
        (60, "can_save", "saves", [INT], 75, "SIGINT: the run saves a checkpoint and ends"),
        (60, "can_save", "saves", [HUP], 75, "SIGHUP: the run saves a checkpoint and ends"),
        (60, "nothing", "hangs", [TERM], 75, "SIGTERM: the process ends; there is nothing to save"),
        (60, "nothing", "hangs", [HUP], 75, "SIGHUP: the process ends; there is nothing to save"),
        (60, "nothing", "hangs", [INT], 130, "SIGINT: the process ends; there is nothing to save"),
        (60, "can_save", "hangs", [TERM, TERM], 143, "SIGTERM, a second signal: the process ends without saving"),
        (60, "can_save", "hangs", [TERM, INT], 130, "SIGINT, a second signal: the process ends without saving"),
        (60, "can_save", "hangs", [INT, HUP], 129, "SIGHUP, a second signal: the process ends without saving"),
        (0.2, "can_save", "hangs", [TERM], 1, "not saved within config.checkpoint.grace_seconds=0.2 of SIGTERM"),
    ],
)
def test_how_a_process_ends(grace, can_save, does, signals, code, said, listens, start):
    process = start(grace, can_save, does)
    if not listens:
        process.stderr.close()
    process.send_signal(signals[0])
    lines = []
    if len(signals) == 2:
        if listens:
            lines.append(process.stderr.readline())
            assert lines[0].endswith("saves a checkpoint and ends\n")
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
        process.send_signal(signals[1])
    assert process.wait(timeout=20) == code
    if listens:
        lines += process.stderr.readlines()
        assert said in lines[-1]
        assert len(lines) <= 2  # one for each signal, or for the time that is over


@pytest.mark.parametrize("can_save", ["can_save", "nothing"])
def test_sigusr1_saves_once_and_the_process_goes_on(can_save, start):
    process = start(60, can_save, "saves")
    process.send_signal(USR1)
    assert process.stdout.readline() == "saved\n"
    when = "now" if can_save == "can_save" else "as soon as there is something to save"
    assert process.stderr.readline() == f"SIGUSR1: the run saves {when}, and continues\n"
    process.send_signal(USR1)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(TERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (75, "")


@pytest.mark.parametrize(
    ("prefix", "ignored"), [(("nohup",), HUP), (("sh", "-c", 'trap "" INT; exec "$@"', "sh"), INT)]
)
def test_what_a_process_was_started_to_ignore_stays_ignored(prefix, ignored, start):
    process = start(60, "can_save", "saves", prefix)
    process.send_signal(ignored)
    process.send_signal(TERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert err.endswith("SIGTERM: the run saves a checkpoint and ends\n")
    assert ignored.name not in err
