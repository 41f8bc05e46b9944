"""SIGTERM to some of three real processes: all stop at one place, soon, also when one runs behind the others."""

import itertools
import os
import signal
import subprocess
import sys
import types

import pytest

from launch import local
from tests.test_cli import ROOT
from tvq_pod.parallel.stopping import StopTogether

# jax looks for a TPU, and says so, unless it is told that there is none
QUIET = dict(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

PROGRAM = """
import sys, time
import jax
from tvq_pod.parallel import processes
from tvq_pod.parallel.stopping import StopTogether
from tvq_pod.preemption import Preemption
preemption = Preemption(60)
port, index, late, last = sys.argv[1:]
processes.join(f"127.0.0.1:{port}", 3, int(index), False)
preemption.can_save = True
stop = StopTogether(preemption, 60)
time.sleep(float(late))
place = 0
while place < int(last) and not stop.now():
    print(place := place + 1, file=sys.stderr, flush=True)
    time.sleep(0.2)
stop.close()
print("ends after", place, file=sys.stderr, flush=True)
"""


def started(last: int) -> list[subprocess.Popen]:
    port = str(local.free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(index), str(late), str(last)],
            env=os.environ | QUIET, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for index, late in enumerate((0, 0.7, 0.3))
    ]  # fmt: skip


def last_place_of(job: subprocess.Popen) -> int:
    _, err = job.communicate(timeout=60)
    *_, line = err.splitlines()
    assert job.returncode == 0, err
    assert line.startswith("ends after "), err
    return int(line.split()[-1])


@pytest.mark.parametrize("asked", [[0], [2, 1]])
def test_all_stop_at_the_first_place_that_nobody_has_passed(asked):
    jobs = started(1000)
    for _ in range(5):
        first = int(jobs[0].stderr.readline())  # the one that is ahead
    for index in asked:
        jobs[index].send_signal(signal.SIGTERM)
    passed = {last_place_of(job) for job in jobs}
    assert len(passed) == 1
    assert first <= passed.pop() <= first + 2  # on a busy machine one may go on while the message is on its way


def test_all_end_by_themselves_when_nobody_is_asked():
    assert [last_place_of(job) for job in started(3)] == [3, 3, 3]


def test_who_is_alone_stops_at_once():
    asked = types.SimpleNamespace(requested=False)
    stop = StopTogether(asked, 60)
    assert not any(stop.now() for _ in itertools.repeat(None, 3))
    asked.requested = True
    assert stop.now()
