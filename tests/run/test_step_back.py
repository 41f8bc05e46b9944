"""--step=N of train: the run resumes from N, newer checkpoints are set aside, and whatever happens nothing is lost.

Trainings have a step that is quick to compile; what is around it is real.
"""

import dataclasses
import json
import shutil

import pytest
from etils import epath

from tests.command import contents
from tests.made_up import first_state, made_up_step
from tests.run.saved import damage, names
from tests.training.test_bad_steps import NoSignals, assert_same, settings_for, state_of
from tvq_pod.errors import UserError
from tvq_pod.modes import train as train_module
from tvq_pod.modes.train import train
from tvq_pod.run import config_history, metrics
from tvq_pod.run.skipped import Skip, Skipped
from tvq_pod.run.step_folders import StepFolders
from tvq_pod.training import restore

STEPS = 12  # a checkpoint every 3


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)
    monkeypatch.delenv("TVQ_POD_RUN_ID", raising=False)


def settings_of(corpus, **train_changes):
    settings = settings_for(corpus)
    return dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, **(dict(num_steps=STEPS) | train_changes)),
        checkpoint=dataclasses.replace(settings.checkpoint, every_steps=3, keep=0),
    )


def trained(settings, workdir, step=None):
    train(settings, epath.Path(workdir), NoSignals(), step)


@pytest.fixture(scope="module")
def done_once(tmp_path_factory, corpus):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "compiled_train_step", made_up_step)
        patch.setattr(restore, "create_train_state", first_state)
        workdir = tmp_path_factory.mktemp("done") / "run"
        trained(settings_of(corpus), workdir)
    return workdir


@pytest.fixture
def workdir(done_once, tmp_path):
    """A run that has ended, with checkpoints 3, 6, 9 and 12."""
    return shutil.copytree(done_once, tmp_path / "run")


def digests(workdir):
    """The digest of each step's line, the later of two."""
    return {step: line["digest"] for step, line in metrics.lines_of(epath.Path(workdir), "train").items()}


def history(workdir):
    path = workdir / config_history.NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow(5)
def test_a_run_goes_back_and_sets_newer_checkpoints_aside(workdir, done_once, corpus, capsys):
    settings = settings_of(corpus)
    trained(settings, workdir, step=6)
    assert names(workdir) == ["12", "12.undone", "3", "6", "9", "9.undone"]
    said = capsys.readouterr().err
    assert "UNDONE: checkpoint" in said
    assert "resumes from step 6" in said
    assert "--step=6: 2 newer checkpoint(s) set aside; leave --step out" in said
    (line,) = history(workdir)
    assert (line["step"], line["set_aside"], line["changed"]) == (6, [9, 12], {})
    assert_same(state_of(settings, workdir, STEPS), state_of(settings, done_once, STEPS))
    for step in (9, 12):  # what was set aside is what it was
        now, before = contents(workdir / f"checkpoints/{step}.undone"), contents(done_once / f"checkpoints/{step}")
        assert list(now.values()) == list(before.values())
    logged = [line["step"] for line in metrics.all_lines(epath.Path(workdir)) if line["split"] == "train"]
    assert logged == [*range(1, STEPS + 1), *range(7, STEPS + 1)]
    assert digests(workdir) == digests(done_once)
    trained(settings, workdir, step=6)  # again on purpose
    assert names(workdir) == ["12", "12.undone", "12.undone-2", "3", "6", "9", "9.undone", "9.undone-2"]


@pytest.mark.slow(3)
def test_the_newest_step_is_no_step_back(workdir, corpus):
    trained(settings_of(corpus), workdir, step=STEPS)
    assert names(workdir) == ["12", "3", "6", "9"]
    assert history(workdir) == []


@pytest.mark.slow(6)
def test_what_was_set_aside_can_be_brought_back(workdir, done_once, corpus):
    """The other branch has read other tokens since, and logged other digests for the same steps."""
    trained(settings_of(corpus, context_schedule="0:8"), workdir, step=6)
    assert digests(workdir)[12] != digests(done_once)[12]
    for step in (9, 12):
        (workdir / f"checkpoints/{step}").rename(workdir / f"checkpoints/{step}.other")
        (workdir / f"checkpoints/{step}.undone").rename(workdir / f"checkpoints/{step}")
    trained(settings_of(corpus, num_steps=14), workdir)
    longer = workdir.with_name("longer")
    trained(settings_of(corpus, num_steps=14), longer)
    assert digests(workdir)[14] == digests(longer)[14]


@pytest.mark.slow(6)
@pytest.mark.parametrize("step", [None, 3])
def test_killed_half_way_it_is_a_run_that_goes_on(workdir, done_once, corpus, monkeypatch, step):
    set_aside, calls = StepFolders.set_aside, []

    def killed(self, at, why):
        calls.append(at)
        if len(calls) == 2:
            raise KeyboardInterrupt
        set_aside(self, at, why)

    with monkeypatch.context() as patch:
        patch.setattr(StepFolders, "set_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(settings_of(corpus), workdir, step=3)
    assert names(workdir) == ["12.undone", "3", "6", "9"]
    trained(settings_of(corpus), workdir, step)
    assert digests(workdir) == digests(done_once)
    aside = {None: ["12.undone"], 3: ["12.undone", "6.undone", "9.undone"]}[step]
    assert [name for name in names(workdir) if "." in name] == aside
    assert_same(state_of(settings_of(corpus), workdir, STEPS), state_of(settings_of(corpus), done_once, STEPS))


@pytest.mark.slow(3)
def test_a_launch_that_repeats_its_command_goes_back_once(workdir, corpus, monkeypatch, capsys):
    monkeypatch.setenv("TVQ_POD_RUN_ID", "launch-1")
    trained(settings_of(corpus, num_steps=9), workdir, step=6)
    shutil.rmtree(workdir / "checkpoints/6")  # as keep would, in time
    capsys.readouterr()
    trained(settings_of(corpus), workdir, step=6)
    said = capsys.readouterr().err
    assert "--step=6: this launch has already gone back to it; resuming from the newest checkpoint" in said
    assert "resumes from step 9" in said
    assert len(history(workdir)) == 3  # the step back, and num_steps twice
    monkeypatch.setenv("TVQ_POD_RUN_ID", "launch-2")
    trained(settings_of(corpus), workdir, step=9)
    assert "12.undone-2" in names(workdir)


@pytest.mark.slow(6)
def test_data_that_was_skipped_stays_skipped(workdir, corpus):
    """By the run that went back from bad steps later than N, and then to N on purpose."""
    Skipped(epath.Path(workdir)).add(Skip(0, 8, 8, update=7, count=2), steps=(8, 9), back_to=6)
    trained(settings_of(corpus), workdir, step=6)
    expected = workdir.with_name("expected")
    shutil.copytree(workdir, expected)
    for step in (9, 12):
        shutil.rmtree(expected / f"checkpoints/{step}")
    trained(settings_of(corpus), expected)
    assert digests(expected) == digests(workdir)
    alone = workdir.with_name("alone")
    trained(settings_of(corpus), alone)
    assert digests(alone)[7] == digests(workdir)[7]
    assert digests(alone)[8] != digests(workdir)[8]


def test_a_step_that_is_missing_damaged_or_of_another_run_changes_nothing(workdir, corpus, tmp_path):
    damage(workdir, 3)
    before = contents(workdir)
    other = dataclasses.replace(settings_of(corpus), seed=5)
    for settings, step, line in (
        (settings_of(corpus), 7, r"^--step=7: has no such checkpoint; give one of 3, 6, 9, 12$"),
        (settings_of(corpus), 3, r"--step=3 is damaged; the checkpoints are 3, 6, 9, 12$"),
        (other, 6, r"^config.seed=5: the checkpoint .*/6 was made with 0"),
    ):
        with pytest.raises(UserError, match=line):
            trained(settings, workdir, step)
    with pytest.raises(UserError, match=r"^--step=6: .*/fresh has no checkpoint to go back to"):
        trained(settings_of(corpus), tmp_path / "fresh", 6)
    assert contents(workdir) == before
    assert not (tmp_path / "fresh").exists()
    for name in ("9.undone", "9.undone-2"):
        shutil.copytree(workdir / "checkpoints/9", workdir / "checkpoints" / name)
    shutil.rmtree(workdir / "checkpoints/9")
    with pytest.raises(
        UserError,
        match=r"^--step=9: has no such checkpoint; give one of 3, 6, 12; .*, rename 9.undone or 9.undone-2 to 9$",
    ):
        trained(settings_of(corpus), workdir, 9)
