"""Signals to some of three real processes: all save, or stop, at one place, soon, also when one runs behind the
others."""

import os
import signal
import subprocess
import sys
import types

import pytest

from launch import local
from tests import forked
from tests.command import ROOT
from tvq_pod.run.preemption import SAVE, STOP
from tvq_pod.run.stopping import StopTogether

# jax looks for a TPU, and says so, unless it is told that there is none
QUIET = dict(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

PROGRAM = """
import sys, time
import jax
from tvq_pod.parallel import processes
from tvq_pod.run.stopping import StopTogether
from tvq_pod.run.preemption import Preemption
preemption = Preemption(60)
port, index, late, last = sys.argv[1:]
processes.join(f"127.0.0.1:{port}", 3, int(index), False)
preemption.can_save = True
stop = StopTogether(preemption, 60)
time.sleep(float(late))
place = 0
while place < int(last) and (asked := stop.now()) != "stop":
    print("saves" if asked else "passes", place := place + 1, flush=True)
    time.sleep(0.1)
stop.close()
print("ends after", place, file=sys.stderr, flush=True)
"""


def started(last: int) -> list[subprocess.Popen]:
    port = str(local.free_port())
    return [
        forked.Popen(
            [sys.executable, "-c", PROGRAM, port, str(index), str(late), str(last)],
            env=os.environ | QUIET, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index, late in enumerate((0, 0.7, 0.3))
    ]  # fmt: skip


def next_place(job: subprocess.Popen) -> tuple[str, int]:
    """What it does at the next place that it passes, and the place."""
    assert job.stdout
    while not (line := job.stdout.readline()).startswith(("passes", "saves")):
        assert line
    does, place = line.split()
    return does, int(place)


def passed(job: subprocess.Popen) -> int:
    """The next place that it passes."""
    return next_place(job)[1]


def last_place_of(job: subprocess.Popen) -> int:
    _, err = job.communicate(timeout=60)
    *_, line = err.splitlines()
    assert job.returncode == 0, err
    assert line.startswith("ends after "), err
    return int(line.split()[-1])


@pytest.mark.slow(2)
@pytest.mark.parametrize("asked", [[0], [2, 1]])
def test_all_stop_at_the_first_place_that_nobody_has_passed(asked):
    jobs = started(1000)
    *_, first = (passed(jobs[0]) for _ in range(5))  # the one that is ahead
    for index in asked:
        jobs[index].send_signal(signal.SIGTERM)
    places = {last_place_of(job) for job in jobs}
    assert len(places) == 1
    assert first <= places.pop() <= first + 2  # on a busy machine one may go on while the message is on its way


@pytest.mark.slow
def test_all_save_at_the_same_places_as_often_as_any_is_asked_and_then_stop_at_one():
    jobs = started(1000)
    saves, asked_at = [[] for _ in jobs], []

    def read_on(index: int) -> int:
        does, place = next_place(jobs[index])
        if does == "saves":
            saves[index].append(place)
        return place

    for n_saves, asked in enumerate([[1], [0, 2], [2]], start=1):
        asked_at.append(read_on(0))
        for index in asked:
            jobs[index].send_signal(signal.SIGUSR1)
        for index in range(3):
            while len(saves[index]) < n_saves:
                read_on(index)
    jobs[1].send_signal(signal.SIGINT)
    rests = [job.stdout.read().splitlines() for job in jobs if job.stdout]  # until all have ended
    assert len({last_place_of(job) for job in jobs}) == 1
    for index, rest in enumerate(rests):
        saves[index] += [int(line.split()[1]) for line in rest if line.startswith("saves")]
    assert saves[0] == saves[1] == saves[2]
    assert len(saves[0]) in (3, 4)  # two that were asked in the same round save once
    first, second, *_, last = saves[0]
    assert all(asked < saved for asked, saved in zip(asked_at, (first, second, last), strict=True))


@pytest.mark.slow(1)
def test_all_end_by_themselves_when_nobody_is_asked():
    assert [last_place_of(job) for job in started(3)] == [3, 3, 3]


def test_who_is_alone_stops_at_once():
    wishes = [False, True, False]
    asked = types.SimpleNamespace(requested=False, take_save=lambda: wishes.pop(0))
    stop = StopTogether(asked, 60)
    assert [stop.now() for _ in range(3)] == [None, SAVE, None]
    asked.requested = True
    assert stop.now() == STOP
