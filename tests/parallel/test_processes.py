"""Jobs of several real processes: they train as one does, end together, and refuse what would split them."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import local
from tests import forked
from tvq_pod.data.loader import joined, local_part
from tvq_pod.errors import UserError
from tvq_pod.parallel import processes

FLAGS = [
    "--config=configs/stdlib.py",
    *(f"--config.model.{name}={value}" for name, value in dict(
        d_model=16, d_k=8, d_v=16, n_layer=1, n_code=8, block_len=8, mem_len=8, p_dropres=0.2, p_droplyr=0.1).items()),
    "--config.data.format=folder", "--config.train.num_steps=20", "--config.train.log_every_steps=1",
    "--config.train.batch_size=4", "--config.train.update_len=32", "--config.checkpoint.every_steps=10",
    "--config.eval.max_tokens=500", "--config.sample.length=8", "--config.metrics.tensorboard=False",
    "--config.data.validation_share=0.3",
]  # fmt: skip


def launched(*arguments: str, popen: type[subprocess.Popen] = forked.Popen, **settings) -> subprocess.Popen:
    """settings: of Popen."""
    command = [sys.executable, "-m", "launch.local", *arguments]
    return popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"the {n}th document says {n * n} and no more. " * 20)
    return folder


def lines_of(workdir, split):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == split}


@pytest.mark.slow(35)
def test_losses_do_not_depend_on_how_many_processes_there_are(corpus, tmp_path):
    """2 processes over sequence and heads, and 1 over rows; each writes one line a step, and one sample."""
    losses = []
    few = ["--config.train.num_steps=8", "--config.checkpoint.every_steps=0"]
    for n, mesh in [(2, ["--config.mesh.sequence=2", "--config.mesh.model=2"]), (1, [])]:
        workdir = tmp_path / str(n)
        flags = [*FLAGS, *few, *mesh, f"--config.data.source={corpus}", f"--workdir={workdir}"]
        job = launched(f"--processes={n}", f"--devices_per_process={4 // n}", "--", *flags)
        output, _ = job.communicate(timeout=200)
        assert job.returncode == 0, output
        assert output.count("done:") == 1
        assert (workdir / "samples" / "step_8.txt").exists()
        losses.append((lines_of(workdir, "train"), lines_of(workdir, "validation")))
    (train, validation), (other_train, other_validation) = losses
    assert list(train) == list(other_train) == list(range(1, 9))
    np.testing.assert_allclose(list(train.values()), list(other_train.values()), rtol=1e-4)
    np.testing.assert_allclose(validation[8], other_validation[8], rtol=1e-4)


@pytest.mark.slow
def test_all_processes_go_back_together_and_give_up_together(corpus, tmp_path):
    """Codes that die make every step bad from some step on, after checkpoints of the same session."""
    flags = [*FLAGS, f"--config.data.source={corpus}", f"--workdir={tmp_path / 'run'}", "--config.model.n_code=64",
             "--config.model.c_gamma=0.6", "--config.bad_steps.max_dead_codes=0.0",
             "--config.bad_steps.rollback_after=2", "--config.bad_steps.max_rollbacks=1",
             "--config.checkpoint.every_steps=2", "--config.model.head_type=mqa"]  # fmt: skip
    job = launched("--processes=2", "--devices_per_process=2", "--", *flags)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 1, output
    (skip,) = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert skip["back_to"] > 0
    assert f"resumes from step {skip['back_to']}" in output
    assert "error: config.bad_steps.max_rollbacks=1: steps" in output
    assert "Traceback" not in output


@pytest.mark.slow(4)
def test_a_mistake_ends_all_processes_with_one_line_each(corpus, tmp_path):
    flags = [*FLAGS, f"--config.data.source={corpus}/nothing", f"--workdir={tmp_path / 'run'}"]
    job = launched("--processes=2", "--devices_per_process=2", "--", *flags, popen=subprocess.Popen)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "error: config.data.source=" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_while_a_corpus_is_prepared_ends_all_processes_with_one_line_each(tmp_path):
    """The terminal sends it to the launcher's process group; SIGUSR1, which all get before, ends none."""
    (tmp_path / "run").mkdir()
    flags = ["--config=configs/stdlib.py", "--mode=prepare", f"--workdir={tmp_path / 'run'}"]
    with (tmp_path / "run/store.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        job = launched("--processes=2", "--devices_per_process=1", "--", *flags, start_new_session=True)
        assert job.stdout
        while not (line := job.stdout.readline()).startswith("waiting: another process is preparing"):
            assert line
        os.killpg(job.pid, signal.SIGUSR1)
        said = (line for line in job.stdout if "[Gloo]" not in line)  # which says when processes have met
        told = {next(said) for _ in range(2)}
        os.killpg(job.pid, signal.SIGINT)
        lines = job.stdout.readlines()
        assert job.wait(timeout=60) == 128 + signal.SIGINT
    noted = "SIGUSR1: the run saves as soon as there is something to save, and continues\n"
    assert told == {noted, f"[1] {noted}"}
    ends = "SIGINT: the process ends; there is nothing to save\n"
    assert lines.count(ends) == 1  # each process got it once
    assert lines.count(f"[1] {ends}") <= 1  # or jax was quicker to end it, when process 0 was gone
    assert not any("Traceback" in line for line in lines)


def sleepers(*codes) -> list[subprocess.Popen]:
    """Processes that end with a code at once, or for None go on."""
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"import time, sys\nif {code} is None: time.sleep(60)\nsys.exit({code})"]
        )
        for code in codes
    ]


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((None, 3), 3), ((75, None), 75)])
def test_when_one_fails_the_others_are_ended_and_its_code_is_passed_on(codes, expected):
    began = time.monotonic()
    jobs = sleepers(*codes)
    assert local.wait(jobs, grace_seconds=5) == expected
    assert time.monotonic() - began < 20
    assert all(job.poll() is not None for job in jobs)


@pytest.mark.parametrize("codes", [(3, 0), (0, 3), (0, 0)])
def test_codes_of_processes_that_end_together_are_all_seen(codes):
    jobs = sleepers(*codes)
    for job in jobs:
        job.wait()
    assert local.wait(jobs, grace_seconds=5) == max(codes)


def test_a_killed_process_counts_as_its_signal():
    jobs = sleepers(None, None)
    os.kill(jobs[1].pid, signal.SIGKILL)
    assert local.wait(jobs, grace_seconds=5) == 128 + signal.SIGKILL


def test_what_would_leave_a_process_alone_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"--num_processes=: must be given with the others"):
        processes.join("127.0.0.1:1", None, 0, False)
    with pytest.raises(UserError, match=r"--process_id=2: must be 0 \.\. 1"):
        processes.join("127.0.0.1:1", 2, 2, False)
    with pytest.raises(UserError, match=r"--multihost: finds the other processes by itself"):
        processes.join("127.0.0.1:1", 2, 0, True)
    with pytest.raises(UserError, match=r"--multihost: this process could not join the others"):
        processes.join(None, None, None, True)  # nothing here says who the others are
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    with pytest.raises(UserError, match=r"config.mesh.slices=1: contradicts MEGASCALE_NUM_SLICES=2.*unset"):
        processes.check_slices(1)
    processes.check_slices(2)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "two")
    with pytest.raises(UserError, match=r"contradicts MEGASCALE_NUM_SLICES=two in the environment; unset MEGASCALE"):
        processes.check_slices(2)
    monkeypatch.delenv("MEGASCALE_NUM_SLICES")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "10.0.0.9:8080")
    with pytest.raises(UserError, match="unset MEGASCALE_COORDINATOR_ADDRESS"):
        processes.check_slices(1)


@pytest.mark.parametrize("address", ["nonsense", ":1234", "host:12x", "host:"])
def test_an_address_that_is_none_is_refused_at_once(address):
    with pytest.raises(UserError, match=r"--coordinator_address=.*: must be HOST:PORT of process 0"):
        processes.join(address, 2, 0, False)


@pytest.mark.slow
def test_a_process_whose_peers_do_not_come_ends_in_one_line(corpus, tmp_path):
    """Process 0 waits for another; process 1 for a process 0 that is not there."""
    flags = [*FLAGS, f"--config.data.source={corpus}", f"--workdir={tmp_path / 'run'}", "--join_timeout_seconds=5"]
    jobs = [
        forked.Popen(
            [sys.executable, "-m", "tvq_pod.main", *flags, f"--coordinator_address=127.0.0.1:{port}",
             "--num_processes=2", f"--process_id={index}"], stderr=subprocess.PIPE, text=True,
        )
        for index, port in enumerate((local.free_port(), local.free_port()))
    ]  # fmt: skip
    for job in jobs:
        _, err = job.communicate(timeout=100)
        assert job.returncode == 1
        assert "this process could not join the others within --join_timeout_seconds=5" in err.splitlines()[-1]


def test_what_one_decides_holds_and_its_error_is_raised():
    assert processes.decided_by_process_zero(True)
    with pytest.raises(UserError, match="full"):
        processes.on_process_zero(lambda: (_ for _ in ()).throw(UserError("disk full")))


class HostSharding:
    """A sharding of which only some devices are this process's."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        return {device: self._sharding.devices_indices_map(shape)[device] for device in self._devices}


def test_a_process_reads_the_rows_and_tokens_that_its_devices_hold(eight_devices):
    mesh = Mesh(np.array(eight_devices).reshape(2, 4), ("rows", "tokens"))
    sharding = NamedSharding(mesh, PartitionSpec("rows", "tokens"))
    every = [range(begin, begin + 8) for begin in range(0, 32, 8)]
    assert local_part(sharding, (4, 32)) == ([0, 1, 2, 3], every)  # this process holds all devices
    own = HostSharding(sharding, eight_devices[4:6])
    assert local_part(own, (4, 32)) == ([2, 3], every[:2])


def test_a_hosts_tokens_need_not_be_one_range(eight_devices, monkeypatch):
    """On a TPU slice a host is a rectangle of chips: of a long row it may have two stretches that are far apart."""
    sharding = NamedSharding(
        Mesh(np.array(eight_devices).reshape(1, 8), ("rows", "tokens")), PartitionSpec(None, "tokens")
    )
    own = HostSharding(sharding, [eight_devices[i] for i in (5, 0, 4)])
    shape, everything = (2, 32), np.arange(64).reshape(2, 32)
    rows, tokens = local_part(own, shape)
    assert tokens == [range(0, 4), range(16, 20), range(20, 24)]
    part = np.concatenate([everything[:, list(range_)] for range_ in tokens], axis=1)
    asked = []
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, callback: asked.append(callback))
    joined(own, shape, rows, tokens, part)
    for index in own.addressable_devices_indices_map(shape).values():
        np.testing.assert_array_equal(asked[0](index), everything[index])
    monkeypatch.undo()
    whole = joined(sharding, shape, *local_part(sharding, shape), everything)
    np.testing.assert_array_equal(whole, everything)
