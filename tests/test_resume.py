"""A killed run goes on as if nothing had happened: real processes, real kills, equal bits."""

import os
import shutil
import signal
import time

from tests.test_cli import config_file, corpus, fingerprint, finish, metrics_of, run, start

__all__ = ["config_file", "corpus"]  # fixtures

FLAGS = [
    "--config.sample.length=0",
    "--config.eval.every_steps=20",
    "--config.eval.at_end=False",
    "--config.model.p_dropres=0.2",
    "--config.model.p_droplyr=0.2",
    "--config.train.log_every_steps=1",
    "--config.train.update_len=1024",  # slow enough to be killed between two saves
    "--config.model.reduction=serial",  # and quick to compile, with its 128 blocks
]


def kill_once_saved(process, workdir, step):
    """SIGKILL, as soon as the checkpoint of `step` is whole."""
    deadline = time.monotonic() + 200
    while not (workdir / f"checkpoints/{step}").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_and_started_again_ends_with_the_same_bits(tmp_path, config_file):
    devices = 8
    flags = [f"--config={config_file}", *FLAGS]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    left_alone = start(*flags, f"--workdir={straight}", devices=devices)
    process = start(*flags, f"--workdir={killed}", devices=devices)
    kill_once_saved(process, killed, 20)
    assert not (killed / "checkpoints/40").exists()
    # half a save, as a kill in the middle of one leaves behind
    half = killed / "checkpoints/40.orbax-checkpoint-tmp"
    if not half.exists():
        shutil.copytree(killed / "checkpoints/20/params", half / "params.orbax-checkpoint-tmp")
    _, err = run(*flags, f"--workdir={killed}", devices=devices)
    assert "goes on from step 20" in err

    code, _, err = finish(left_alone)
    assert code == 0, err
    expected, _ = run("--mode=inspect", f"--workdir={straight}")
    found, _ = run("--mode=inspect", f"--workdir={killed}")
    assert "step: 40" in found
    assert fingerprint(found) == fingerprint(expected)

    # every step's loss is the same too, those that were logged twice included
    losses = {line["step"]: line["loss"] for line in metrics_of(straight, "train")}
    assert set(losses) == {line["step"] for line in metrics_of(killed, "train")} == set(range(1, 41))
    assert all(line["loss"] == losses[line["step"]] for line in metrics_of(killed, "train"))
    evaluations = [
        [(line["step"], line["loss"]) for line in metrics_of(run, "validation")] for run in (straight, killed)
    ]
    assert evaluations[0] == evaluations[1]
    assert [step for step, _ in evaluations[0]] == [20, 40]


def test_two_runs_in_one_folder_the_second_is_refused_and_the_first_goes_on(tmp_path, config_file):
    flags = [f"--config={config_file}", *FLAGS, f"--workdir={tmp_path / 'run'}"]
    first = start(*flags)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code, _, err = finish(start(*flags))
    assert code == 1
    assert f"is in use by another process (process {first.pid} on" in err.splitlines()[-1]
    code, _, err = finish(first)
    assert code == 0, err
    # a dead process holds nothing: the folder is free again
    run(*flags)
