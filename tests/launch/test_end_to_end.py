"""The whole of it, with nothing pretended but gcloud and systemd: two machines, each with a home and an environment of
its own, into which this commit is installed; one training over both, which find each other as jax finds TPU workers; a
bucket; a slice that is taken back. (Without a chip jax asks no metadata server who the workers are: they are told by
TPU_WORKER_HOSTNAMES, as on GKE.)"""

import os
import pathlib
import subprocess
import sys
import sysconfig
import time

import pytest

from tests import forked
from tests.buckets import reached_at
from tests.command import environment, fingerprint, run
from tests.launch.conftest import ROOT, write_program

UP = ("--name=run", "--accelerator=v4-16", "--zone=us-central2-b", "--spot", "--allow_dirty", "--poll_seconds=0.5")
TRAINING = [
    "--config=configs/stdlib.py",
    "--config.model.d_model=16",
    "--config.model.d_k=8",
    "--config.model.d_v=16",
    "--config.model.n_code=8",
    "--config.model.n_layer=1",
    "--config.model.block_len=16",
    "--config.model.mem_len=16",
    "--config.train.batch_size=4",
    "--config.train.num_steps=100",
    "--config.train.log_every_steps=5",
    "--config.checkpoint.every_steps=0",
    "--config.eval.at_end=False",
    "--config.sample.length=0",
]


@pytest.mark.slow(60)
def test_a_training_on_two_machines_that_are_taken_back_ends_as_one_that_was_left_alone(
    laptop, tmp_path, server, monkeypatch
):
    store = f"--config.data.store={tmp_path / 'store'}"
    run("--mode=prepare", *TRAINING, store, f"--workdir={tmp_path / 'alone'}")
    as_on_two_machines(tmp_path / "alone", store, monkeypatch)
    expected, _ = run("--mode=inspect", f"--workdir={tmp_path / 'alone'}")

    files = reached_at(monkeypatch, server)
    names = ("STORAGE_EMULATOR_HOST", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "TENSORSTORE_GCS_HTTP_URL")
    bucket = {name: os.environ[name] for name in names}
    laptop.environment |= bucket
    # A virtual environment is made once, and copied whenever a machine makes one.
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    copied = f'[ "$1 $2" != "-m venv" ] || exec cp --recursive {made} "$3"'
    write_program(laptop.cloud.folder / "bin/python3", f'{copied}\nexec {sys.executable} "$@"')
    laptop.set(environment=laptop.get("environment") | bucket | machine_settings())

    laptop.must("up", *UP)
    laptop.must("run", "--name=run", "--", *TRAINING, store, "--workdir=gs://bucket/pod")
    watch = laptop.start("watch", "--name=run", "--poll_seconds=0.5")
    wait_for_step(laptop, 10)
    laptop.cloud.preempt("run", grace=20.0)
    out, err = watch.communicate(timeout=200)
    assert watch.returncode == 0, out + err
    assert "SUSPENDED: was taken back" in out
    log = laptop.must("logs", "--name=run", "--lines=1000")
    assert "resumes from step" in log
    assert "on 2 cpu device(s), mesh {'slice': 1, 'data': 2" in log
    found, _ = run("--mode=inspect", "--workdir=gs://bucket/pod")
    assert fingerprint(found) == fingerprint(expected)
    assert (
        len(files.cat("bucket/pod/packages.jsonl").splitlines()) == 1
    )  # the packages are the same after the preemption
    assert "done" in laptop.must("status")
    for machine in ("run-0", "run-1"):
        wait_for_log(files, f"bucket/pod/logs/{machine}.attempt-*-2.log")
    laptop.must("down", "--name=run", "--yes")
    assert laptop.get("queued") == {}
    assert not list((laptop.cloud.folder / "machines").iterdir())


def test_two_machines_find_each_other_as_tpu_workers_do(laptop):
    """By the metadata server and the variables that the training above has."""
    laptop.set(queued=dict(run=dict(state="ACTIVE", type="v4-16", count=1, prefix="run")))
    program = """if True:
        import jax
        from tvq_pod.parallel import processes
        processes.join(None, None, None, True)
        agreed = processes.from_process_zero(7 + jax.process_index())
        print(jax.process_index(), jax.process_count(), agreed, flush=True)
    """
    jobs = []
    for worker in "01":
        values = laptop.get("environment") | machine_settings()
        for name, value in values.items():
            values[name] = value.replace("MACHINE", f"run/{worker}").replace("WORKER", worker)
        command, pipe = [sys.executable, "-c", program], subprocess.PIPE
        jobs.append(subprocess.Popen(command, env=os.environ | values, cwd=ROOT, text=True, stdout=pipe, stderr=pipe))
    outs = [job.communicate(timeout=100) for job in jobs]
    assert [out.splitlines()[-1:] for out, _ in outs] == [["0 2 7"], ["1 2 7"]], outs


def wait_for_log(files, pattern: str) -> None:
    """Until the machine's log is in the bucket."""
    deadline = time.monotonic() + 60
    while not fresh(files, pattern):
        assert time.monotonic() < deadline, files.find("bucket/pod/logs")
        time.sleep(0.5)


def fresh(files, pattern: str) -> list[str]:
    """Names that are there now."""
    files.invalidate_cache()
    return files.glob(pattern)


def as_on_two_machines(workdir: pathlib.Path, store: str, monkeypatch) -> None:
    """Left alone: two processes with a device each, as the pod has."""
    from launch import local

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", forked.Popen)
        processes = local.start(2, 1, [*TRAINING, store, f"--workdir={workdir}"])
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def machine_settings() -> dict:
    """What makes a machine of this one: jax takes it for a Cloud TPU VM; pip takes packages from here."""
    return dict(
        JAX_PLATFORMS="cpu",
        JAX_FORCE_TPU_INIT="1",
        TPU_WORKER_HOSTNAMES="127.0.0.1,127.0.0.1",
        TPU_WORKER_ID="WORKER",
        XLA_FLAGS=environment(devices=1)["XLA_FLAGS"],
        JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"],
        PYTHONPATH=sysconfig.get_path("purelib"),
        PIP_NO_INDEX="1",
        PIP_NO_DEPS="1",
        PIP_NO_BUILD_ISOLATION="0",  # which means 1
        PIP_NO_COMPILE="1",
    )


def wait_for_step(laptop, step: int) -> None:
    """Until its line is in the first machine's journal."""
    journal = laptop.cloud.machine("run", 0) / "services/tvq_pod.service.journal"
    deadline, text = time.monotonic() + 120, ""
    while time.monotonic() < deadline:
        text = journal.read_text() if journal.exists() else ""
        if f"step  {step}/" in text or f"step {step}/" in text:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came:\n{text}")
