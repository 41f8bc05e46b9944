"""A killed run goes on as if nothing had happened: real processes, real kills, equal bits."""

import dataclasses
import random
import signal
import time

from etils import epath

from tests import chaos
from tests.command import finish, metrics_of, run, start
from tests.training.test_bad_steps import settings_for
from tvq_pod.config.settings import EvalSettings
from tvq_pod.modes.train import train
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader

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


def test_signals_save_and_end_one_process_too_and_the_next_start_goes_on(tmp_path, config_file):
    """SIGUSR1 twice, while it starts and in a step; then Ctrl-C; and SIGTERM to the next start."""
    flags = [f"--config={config_file}", *FLAGS, f"--workdir={tmp_path / 'run'}"]
    process, lines = start(*flags), []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("store "):  # restore and compilation are still to come
            process.send_signal(signal.SIGUSR1)
        if line.startswith("step  5/"):
            process.send_signal(signal.SIGUSR1)
        if line.startswith("step  9/"):
            process.send_signal(signal.SIGINT)
        if line.startswith("saved step"):
            saved = int(line.split()[2])
    assert process.wait() == 75, lines
    assert any(line.startswith("SIGUSR1: the run saves as soon as") for line in lines)
    assert 9 < saved <= 13  # at most three steps were on their way
    first, second, last = sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert first == 1
    assert 5 < second <= 9
    assert last == saved
    assert (tmp_path / f"run/checkpoints/{saved}/manifest.json").exists()
    early = start(*flags)
    time.sleep(1.5)  # while it starts: there is nothing to save
    early.send_signal(signal.SIGTERM)
    _, err = early.communicate()
    assert early.returncode in (75, -signal.SIGTERM), err
    _, err = run(*flags)
    assert f"goes on from step {saved}" in err


class AskedToSaveAt:
    """SIGUSR1 before the run asks for the n-th time, for each of these n."""

    requested = can_save = False

    def __init__(self, *times):
        self._asked, self._times = 0, times

    def take_save(self):
        self._asked += 1
        return self._asked in self._times


def test_sigusr1_in_an_evaluation_saves_at_once(tmp_path, corpus, monkeypatch):
    """The run asks after each of 6 steps, and after each step of the evaluation that follows the 4th."""
    settings = settings_for(corpus)
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, validation_share=0.3),
        train=dataclasses.replace(settings.train, num_steps=6),
        checkpoint=dataclasses.replace(settings.checkpoint, every_steps=0),
        eval=EvalSettings(every_steps=4, at_end=False),
    )
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, step, *rest, **more: (
        saved.append(step), save(self, state, step, *rest, **more)))  # fmt: skip
    evaluated, know = [], Checkpoints.know_losses
    monkeypatch.setattr(Checkpoints, "know_losses", lambda self, losses: (
        evaluated.append((list(losses), list(saved))), know(self, losses)))  # fmt: skip
    train(settings, epath.Path(tmp_path), AskedToSaveAt(2, 6))
    assert saved == [2, 4, 6]
    assert evaluated[-1] == ([4], [2, 4])  # the evaluation came to its end
    assert CheckpointReader(epath.Path(tmp_path)).steps() == [2, 4, 6]


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
