"""A killed run goes on as if nothing had happened: real processes, real kills, equal bits."""

import dataclasses
import random
import shutil
import signal
import subprocess

import jax
import pytest
from etils import epath

from tests import chaos, forked
from tests.command import finish, metrics_of, run, said_until, start
from tests.data.made_streams import made_streams
from tests.made_up import first_state, made_up_step
from tests.training.test_bad_steps import AskedAt, NoSignals, settings_for
from tvq_pod.config.settings import EvalSettings
from tvq_pod.data import digest
from tvq_pod.data.loader import Feed
from tvq_pod.data.store import TokenStore
from tvq_pod.errors import Preempted, UserError
from tvq_pod.modes import train as train_module
from tvq_pod.modes.train import train
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.metrics import lines_of
from tvq_pod.training import restore

SLOW_STEPS = [
    "--config.sample.length=0",
    "--config.eval.at_end=False",
    "--config.train.num_steps=1000",
    "--config.train.log_every_steps=1",
    "--config.train.update_len=1024",  # slow enough to be met by a signal between two saves
    "--config.model.reduction=serial",  # and quick to compile, with its 128 blocks
    "--config.checkpoint.every_steps=0",
]


@pytest.mark.slow(40)
def test_a_job_that_is_killed_and_damaged_ends_with_the_same_bits(tmp_path, monkeypatch):
    """A short form of `python -m tests.chaos`: two processes, which are killed at step 21; and a bit of the newest of
    their checkpoints flips. (tests/launch/test_end_to_end.py has the same bits after SIGTERM.)"""
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)
    monkeypatch.setattr(chaos, "STEPS", 24)
    monkeypatch.setattr(chaos, "DEVICES", 2)
    few = ["--config.checkpoint.every_steps=5", "--config.eval.every_steps=0", "--config.eval.at_end=False"]
    few += ["--config.train.context_schedule=0:64,8:256,22:0"]  # the kill comes within a context
    few += ["--config.model.head_type=mqa"]  # quick to compile; the other one is trained with shga
    monkeypatch.setattr(chaos, "TRAIN", [*chaos.TRAIN, *few])
    setting = chaos.Setting(tmp_path / "chaos")
    setting.leave_alone(2, warm_up=False)
    chaos.one_run(tmp_path / "chaos/run", setting, ["a bit flipped"], random.Random(27), exact=2)
    assert list((tmp_path / "chaos/run/checkpoints").glob("*.damaged"))


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_streams_says_so_and_reads_on(tmp_path, trained):
    """Batch size and update length change on request only; the tokens left of the epoch are read next."""
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    flags = [f"--workdir={workdir}", "--config.sample.length=0", "--config.eval.at_end=False",
             "--config.train.batch_size=4", "--config.train.update_len=16"]  # fmt: skip
    _, err = run(*flags, "--config.train.num_steps=50", "--config.train.on_batch_change=restart_streams")
    assert "streams start over at step 40: 4 of them, 16 tokens an update" in err
    assert [line["step"] for line in metrics_of(workdir, "train")][-1] == 50
    # and goes on with these as if they had always been
    again = start(*flags, "--config.train.num_steps=55", "--config.train.on_batch_change=refuse")
    lines = said_until(again, "resumes from step 50")
    assert again.wait() == 75, lines
    assert not any("streams start over" in line for line in lines)


def test_signals_save_and_end_one_process_too_and_the_next_start_goes_on(tmp_path, config_file):
    """SIGUSR1 twice, while it starts and in a step; then Ctrl-C; and SIGTERM to the next start. Meanwhile another run
    in the same folder is refused, and this one goes on."""
    flags = [f"--config={config_file}", *SLOW_STEPS, f"--workdir={tmp_path / 'run'}"]
    process, lines, second, told = start(*flags), [], None, False
    step, asked_at, interrupted_at, saved = 0, 0, 0, 0
    assert process.stderr
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step "):
            step = int(line.split()[1].split("/")[0])
        if line.startswith("store "):  # restore and compilation are still to come
            process.send_signal(signal.SIGUSR1)
        if step == 5 and not second:
            process.send_signal(signal.SIGUSR1)
            second = start(*flags)
        if second and second.poll() is not None and not told:
            process.send_signal(signal.SIGINT)
            told = True
        if line.startswith("SIGUSR1: the run saves now"):
            asked_at = step
        if line.startswith("SIGINT: the run saves a checkpoint and ends"):
            interrupted_at = step
        if line.startswith("saved step"):
            saved = int(line.split()[2].rstrip(";"))
    assert process.wait() == 75, lines
    assert any(line.startswith("SIGUSR1: the run saves as soon as") for line in lines)
    first, on_request, last = sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert first == 1
    assert 5 <= asked_at < on_request <= asked_at + 4  # at most three steps were on their way
    assert interrupted_at < saved <= interrupted_at + 4
    assert last == saved
    assert (tmp_path / f"run/checkpoints/{saved}/manifest.json").exists()
    assert second
    code, _, err = finish(second)
    assert code == 1
    assert f"is in use by another process (process {process.pid} on" in err.splitlines()[-1]
    # A dead process holds nothing: the folder is free again.
    early = start(*flags)
    lines = said_until(early, f"resumes from step {saved}")
    assert early.wait() == 75, lines
    assert lines[-1] == "SIGTERM: the process ends; there is nothing to save\n"


class AskedToSaveAt:
    """SIGUSR1 before the run asks for the n-th time, for each of these n."""

    requested = can_save = False

    def __init__(self, *times):
        self._asked, self._times = 0, times

    def take_save(self):
        self._asked += 1
        return self._asked in self._times


@pytest.mark.slow
def test_contexts_are_cut_alike_in_a_run_that_is_resumed_and_may_change(tmp_path, corpus, monkeypatch, capsys):
    """With a made-up step: the digest of metrics.jsonl has the ids that each step got, counted by hand here."""
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)
    settings = settings_for(corpus)

    def trained_with(contexts, num_steps, workdir, preemption=None):
        train_settings = dataclasses.replace(settings.train, num_steps=num_steps, context_schedule=contexts)
        changed = dataclasses.replace(settings, train=train_settings)
        train(changed, epath.Path(workdir), preemption or NoSignals())
        return {step: line["digest"] for step, line in lines_of(epath.Path(workdir), "train").items()}

    late = "0:8,6:16,10:0"
    with pytest.raises(
        UserError, match=r"^config.train.context_schedule=0:8,6:16,10:0: a stage begins at step 10, and"
    ):
        trained_with(late, 10, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    alone = trained_with(late, 12, tmp_path / "alone")
    with pytest.raises(Preempted, match="saved step 7"):  # in the middle of a context
        trained_with(late, 12, tmp_path / "resumed", AskedAt(7))
    capsys.readouterr()
    assert trained_with(late, 12, tmp_path / "resumed") == alone
    assert "contexts: at most 16 tokens from step 7 on; no limit from step 10 on" in capsys.readouterr().err
    trained_with("", 5, tmp_path / "changed")
    changed = trained_with("0:24", 12, tmp_path / "changed")
    assert "config.train.context_schedule=0:24: was  at the last start" in capsys.readouterr().err

    split, mesh = TokenStore(f"{tmp_path}/alone/store").split("train"), make_mesh(settings.mesh)
    plan, roll = made_streams(split, settings.train.batch_size, settings.seed), jax.jit(digest.roll)
    for found, cuts in (
        (alone, [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]),
        (changed, [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
    ):
        value = digest.start()
        batches = Feed(split, plan, mesh, settings.train.batch_size, settings.train.update_len, 1, 1).batches(0, 12)
        for step, batch in enumerate(batches, start=1):
            value = roll(value, batch | dict(doc_ids=batch["doc_ids"] + cuts[step - 1]))
            assert found[step] == digest.as_text(value), step


@pytest.mark.slow
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
    saved, retained, save = [], [], Checkpoints.save

    def noted(self, state, step, *rest, **more):
        saved.append(step)
        retained.append(more["retain_all"])
        save(self, state, step, *rest, **more)

    monkeypatch.setattr(Checkpoints, "save", noted)
    evaluated, know = [], Checkpoints.know_losses
    monkeypatch.setattr(Checkpoints, "know_losses", lambda self, losses: (
        evaluated.append((list(losses), list(saved))), know(self, losses)))  # fmt: skip
    train(settings, epath.Path(tmp_path), AskedToSaveAt(2, 6))
    assert saved == [2, 4, 6]
    assert retained == [False, True, False]  # it may come between bad steps
    assert evaluated[-1] == ([4], [2, 4])  # the evaluation came to its end
    assert CheckpointReader(epath.Path(tmp_path)).steps() == [2, 4, 6]
