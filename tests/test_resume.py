"""A killed run goes on as if nothing had happened: real processes, real kills, equal bits."""

import random
import signal
import time

from tests import chaos
from tests.test_cli import config_file, corpus, finish, metrics_of, run, start

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


def test_a_job_that_is_preempted_and_damaged_ends_with_the_same_bits(tmp_path, monkeypatch):
    """A short form of `python -m tests.chaos`: two processes, one of which gets SIGTERM; then all are killed, and a bit
    of the newest checkpoint flips."""
    monkeypatch.setattr(chaos, "STEPS", 30)
    setting = chaos.Setting(tmp_path / "chaos")
    setting.leave_alone(2, warm_up=False)
    rng = random.Random(0)
    faults = ["SIGTERM, one process", "a bit flipped"]
    chaos.one_run(tmp_path / "chaos/run", setting, faults, rng, exact=2)


def test_a_run_that_goes_on_with_other_streams_says_so_and_reads_on(tmp_path, config_file):
    """Batch size and update length change on request only; the tokens left of the epoch are read next."""
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--config.sample.length=0",
             "--config.eval.at_end=False"]  # fmt: skip
    run(*flags, "--config.train.num_steps=20")
    _, err = run(*flags, "--config.train.batch_size=4", "--config.train.update_len=16",
                 "--config.train.on_batch_change=restart_streams")  # fmt: skip
    assert "streams start anew at step 20: 4 of them, 16 tokens an update" in err
    assert [line["step"] for line in metrics_of(tmp_path / "run", "train")][-1] == 40
    # and goes on with these as if they had always been
    _, err = run(*flags, "--config.train.batch_size=4", "--config.train.update_len=16", "--config.train.num_steps=45")
    assert "goes on from step 40" in err
    assert "anew" not in err


def test_sigterm_ends_one_process_too_with_75_and_the_next_start_goes_on(tmp_path, config_file):
    flags = [f"--config={config_file}", *FLAGS, f"--workdir={tmp_path / 'run'}"]
    process = start(*flags)
    for line in process.stderr:
        if line.startswith("step  5/"):
            process.send_signal(signal.SIGTERM)
        if line.startswith("saved step"):
            saved = int(line.split()[2])
    assert process.wait() == 75
    assert 5 < saved <= 9  # at most three steps were on their way
    assert (tmp_path / f"run/checkpoints/{saved}/manifest.json").exists()
    early = start(*flags)
    time.sleep(1.5)  # while it starts: there is nothing to save
    early.send_signal(signal.SIGTERM)
    _, err = early.communicate()
    assert early.returncode in (75, -signal.SIGTERM), err
    _, err = run(*flags)
    assert f"goes on from step {saved}" in err


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
