"""Real jobs of two processes in which something hangs: all processes end, with a reason and a code that is not 0.

The jobs are started together, since they mostly wait.
"""

import os
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest

from launch import local
from tests import forked
from tests.command import ROOT, environment
from tests.common import store_of
from tvq_pod.run import manifest

SCENARIOS = ("frozen", "restore", "save", "first", "gather", "evaluation")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def started(scenario: str, folder, index: int = 0, port: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.parallel.deadline_program", port, index, scenario, folder]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return forked.Popen(list(map(str, command)), env=environment(), cwd=ROOT, text=True, **pipes)


def ended(process: subprocess.Popen) -> Ended:
    out, err = process.communicate(timeout=90)
    return Ended(process.returncode, out, err)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, list[Ended]]:
    """What the processes of each scenario said, and their exit codes."""
    folder = tmp_path_factory.mktemp("deadlines")
    store_of(folder / "store", [b"x" * n for n in (40, 50, 60)])
    unreadable = folder / "checkpoints/3"
    unreadable.mkdir(parents=True)
    for name in "abcd":
        (unreadable / name).write_text(name)
    manifest.write_manifest(unreadable)
    for name in "bd":  # every second file is for process 1 to verify
        (unreadable / name).unlink()
        os.mkfifo(unreadable / name)  # to open it waits for a writer
    running, every = {}, []
    try:
        for scenario in SCENARIOS:
            port = local.free_port()
            place = folder if scenario in ("restore", "evaluation") else folder / scenario
            running[scenario] = [started(scenario, place, index, port) for index in range(2)]
            every += running[scenario]
        waiting, frozen = running.pop("frozen")
        while frozen.stdout.readline() not in ("hangs\n", ""):
            pass
        frozen.send_signal(signal.SIGSTOP)
        results = {scenario: [ended(job) for job in pair] for scenario, pair in running.items()}
        results["frozen"] = [ended(waiting)]
        assert frozen.poll() is None
        frozen.send_signal(signal.SIGCONT)
        results["frozen"].append(ended(frozen))
        return results
    finally:  # where a deadline fails to end them
        for job in every:
            job.kill()


LINES = dict(
    frozen="error: --wait_timeout_seconds=4: an agreement of all processes has not ended within 4 s",
    restore="error: config.checkpoint.restore_timeout_seconds=4: verifying the checkpoints in",
    save="error: config.checkpoint.timeout_seconds=2: a save of",
    first="error: --wait_timeout_seconds=4: the work of process 0 has not ended within 4 s",
    gather="error: --wait_timeout_seconds=4: gathering the parameters has not ended",
    evaluation="error: --wait_timeout_seconds=4: a step of the evaluation has not ended",
)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_processes_end_when_one_hangs(jobs, scenario):
    for job in jobs[scenario]:
        assert job.code not in (0, None), job
        assert job.err.strip(), job
        assert "done" not in job.out
    assert LINES[scenario] in jobs[scenario][0].err
    assert jobs[scenario][0].code == 1


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["restore", "save", "first", "evaluation"])
def test_the_process_that_hangs_ends_by_the_same_deadline(jobs, scenario):
    for job in jobs[scenario]:
        assert LINES[scenario] in job.err
        assert job.code == 1


@pytest.mark.slow
def test_who_waits_for_process_0_goes_on_waiting_while_it_is_seen_to_work(jobs):
    assert all("worked" in job.out for job in jobs["first"])


def test_one_process_that_reads_or_writes_alone_has_a_deadline_too(tmp_path):
    job = ended(started("renewed", tmp_path))
    assert (job.code, job.out) == (1, "renewed\nhangs\n")
    assert "error: config.some.setting=0.5: the block has not ended within 0.5 s" in job.err
