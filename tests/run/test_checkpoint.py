"""Checkpoints: what is saved is the state of that step, and another run's checkpoint is refused by name."""

import resource
import shutil
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.made_up import first_state, made_up_step
from tests.run.saved import RECORD, SCHEDULE, SETTINGS, a_batch, damage, names
from tvq_pod.config.settings import CheckpointSettings
from tvq_pod.errors import UserError
from tvq_pod.host.paths import NAME_BYTES, check_saving
from tvq_pod.run import manifest
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.hashes import sha256_of
from tvq_pod.training.step import abstract_train_state


@pytest.mark.slow
def test_what_is_saved_in_the_background_is_the_state_of_that_step(tmp_path, mesh):
    """The step donates its state: a save that still reads it while the next step writes would be caught here."""
    checkpoints, step_fn = Checkpoints(tmp_path, CheckpointSettings(keep=0)), made_up_step(SETTINGS, mesh)
    state, expected = first_state(SETTINGS, mesh), {}
    for step in range(1, 4):
        state, _ = step_fn(state, a_batch(mesh, step))
        expected[step] = sha256_of(jax.tree.map(np.array, state))
        checkpoints.wait()
        checkpoints.save(state, step, RECORD, SCHEDULE)
    step_fn(state, a_batch(mesh, 4))
    checkpoints.wait()
    assert len(set(expected.values())) == 3
    assert checkpoints.steps() == [1, 2, 3]
    abstract = abstract_train_state(SETTINGS, mesh)
    for step in expected:
        restored = checkpoints.restore(step, abstract)
        assert sha256_of(restored) == expected[step]
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)
        assert sha256_of(checkpoints.restore_params(step, abstract.params)) == sha256_of(restored.params)
    checkpoints.close()


@pytest.mark.slow
def test_what_only_another_host_can_t_see_is_not_set_aside(tmp_path, mesh, monkeypatch):
    """As a folder that is not mounted there."""
    checkpoints = Checkpoints(tmp_path, CheckpointSettings())
    checkpoints.save(first_state(SETTINGS, mesh), 3, RECORD, SCHEDULE)
    checkpoints.wait()
    monkeypatch.setattr("tvq_pod.run.checkpoint_reader.all_agree", lambda own: False)
    monkeypatch.setattr("tvq_pod.run.checkpoint_reader.decided_by_process_zero", lambda own: own)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(manifest, "problems", lambda folder, part=0, of=1, real=manifest.problems: real(folder))
    with pytest.raises(UserError, match="step 3 is complete on the host of process 0, but not on every host"):
        checkpoints._is_good(3)
    monkeypatch.undo()
    assert checkpoints.steps() == [3]

    def out_of_files(folder, part=0, of=1):
        raise OSError(24, "Too many open files", str(folder))

    monkeypatch.setattr(manifest, "problems", out_of_files)
    with pytest.raises(UserError, match=r"can't be read \(Too many open files\)"):
        checkpoints.newest_good()
    assert checkpoints.steps() == [3]


@pytest.mark.slow
def test_losses_that_are_none_are_no_best(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep=1, keep_best=1))
    checkpoints.know_losses({1: None, 2: float("nan"), 3: 2.0})
    state = first_state(SETTINGS, mesh)
    for step in (1, 2, 3, 4):
        checkpoints.save(state, step, RECORD, SCHEDULE)
        assert checkpoints.wait(), checkpoints.error
    assert checkpoints.steps() == [3, 4]


def test_what_a_killed_save_left_is_removed_from_this_runs_folder_alone(tmp_path, monkeypatch):
    """As patterns, a[1] and a? would find a1, too."""
    left = [
        f"{run}/checkpoints/7.{rest}" for run in ("a1", "a[1]", "a?") for rest in ("deleting", "orbax-checkpoint-tmp-3")
    ]
    for name in left:
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for run in ("a[1]", "a?"):
        Checkpoints(run, CheckpointSettings()).close()
        assert not list((tmp_path / run / "checkpoints").iterdir())
    assert len(list((tmp_path / "a1/checkpoints").iterdir())) == 2
    (tmp_path / "a[1]/checkpoints/7.damaged").mkdir()
    with pytest.raises(UserError, match=r"has no good checkpoint left \(7.damaged in "):
        Checkpoints("a[1]", CheckpointSettings()).newest_good()
    assert Checkpoints("a1", CheckpointSettings()).newest_good() is None


@pytest.mark.parametrize(
    "name",
    [
        'a] {b,c} it\'s "q" ünï 日本.',
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("with space 50% %41 a#b", "n" * NAME_BYTES)),
    ],
)
@pytest.mark.slow
def test_odd_names_of_folders_are_no_hindrance(name, tmp_path, mesh):
    check_saving("--workdir", f"{tmp_path}/{name}")
    checkpoints = Checkpoints(tmp_path / name, CheckpointSettings())
    state = first_state(SETTINGS, mesh)
    checkpoints.save(state, 5, RECORD, SCHEDULE)
    assert checkpoints.wait(), checkpoints.error
    assert checkpoints.newest_good() == 5
    restored = checkpoints.restore(5, abstract_train_state(SETTINGS, mesh))
    assert sha256_of(restored) == sha256_of(state)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    checkpoints.close()


@pytest.mark.slow
def test_what_is_saved_in_a_folder_that_is_refused_could_indeed_not_be_read(tmp_path, mesh):
    """Should orbax learn to quote, nothing needs to be refused any more."""
    checkpoints = Checkpoints(tmp_path / "lr[1e-3]", CheckpointSettings())
    checkpoints.save(first_state(SETTINGS, mesh), 5, RECORD, SCHEDULE)
    checkpoints.wait()
    with pytest.raises(UserError, match="can't be read"):
        checkpoints.restore(5, abstract_train_state(SETTINGS, mesh))
    with pytest.raises(UserError, match=r"the full path .* has \[, so checkpoints could not be read back"):
        check_saving("--workdir", f"{tmp_path}/lr[1e-3]")
    checkpoints.close()


@pytest.mark.slow
def test_losses_after_the_step_that_a_run_went_back_to_are_forgotten(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep=1, keep_best=1))
    checkpoints.begin(None)
    state = first_state(SETTINGS, mesh)
    checkpoints.save(state, 1, RECORD, SCHEDULE)
    checkpoints.wait()
    checkpoints.know_losses({1: 3.0, 2: 1.0})
    checkpoints.begin(1)
    for step in (2, 3):
        checkpoints.save(state, step, RECORD, SCHEDULE)
        assert checkpoints.wait(), checkpoints.error
    assert checkpoints.steps() == [1, 3]
    checkpoints.close()


@pytest.mark.slow(2)
def test_what_must_be_written_before_a_step_has_its_name_is(tmp_path, mesh):
    seen = []
    checkpoints = Checkpoints(
        tmp_path, CheckpointSettings(), before_named=lambda: seen.append((tmp_path / "checkpoints/1").exists())
    )
    checkpoints.save(first_state(SETTINGS, mesh), 1, RECORD, SCHEDULE)
    assert checkpoints.wait(), checkpoints.error
    assert seen == [False]
    assert checkpoints.steps() == [1]
    checkpoints.close()


@pytest.mark.slow(2)
def test_the_newest_steps_are_kept(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep=2))
    state = first_state(SETTINGS, mesh)
    for step in (1, 2, 3, 4):
        checkpoints.save(state, step, RECORD, SCHEDULE)
        checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    assert checkpoints.pick(None) == 4
    with pytest.raises(UserError, match=r"--step=1: has no such checkpoint; give one of 3, 4"):
        checkpoints.pick(1)
    checkpoints.close()


@pytest.mark.slow(1)
def test_a_damaged_step_is_set_aside_and_the_newest_good_one_used(workdir, capfd):
    damage(workdir, 3)
    damage(workdir, 2)
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    assert checkpoints.newest_good() == 1
    assert names(workdir) == ["1", "2.damaged", "3.damaged"]  # nothing is deleted
    said = capfd.readouterr().err
    assert "its content has changed (CRC-32C)" in said
    assert "DAMAGED: checkpoint" in said
    checkpoints.close()


def test_with_no_good_step_left_a_run_does_not_start_over(workdir):
    for step in (1, 2, 3):
        damage(workdir, step)
    for _ in range(2):  # nor does it the next time
        checkpoints = Checkpoints(workdir, CheckpointSettings())
        with pytest.raises(UserError, match=r"has no good checkpoint left \(1.damaged, 2.damaged, 3.damaged"):
            checkpoints.newest_good()
        checkpoints.close()
    checkpoints = Checkpoints(workdir.parent / "new", CheckpointSettings())
    assert checkpoints.newest_good() is None  # where nothing was saved, all is well
    checkpoints.close()


@pytest.mark.slow
def test_a_save_that_fails_is_told_and_the_next_one_works(workdir, mesh, monkeypatch):
    """On a full disk, or what is the same to it: no file may grow. One of the threads that write comes last."""
    checkpoints = Checkpoints(workdir, CheckpointSettings(keep=1))
    write_json, ended = ocp.JsonCheckpointHandler._save_fn, []

    async def late(*arguments):
        time.sleep(1)
        ended.append("late")
        await write_json(*arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    state = first_state(SETTINGS, mesh)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, most))
    checkpoints.save(state, 4, RECORD, SCHEDULE)
    saved = checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not saved
    assert ended == ["late"]
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert "File too large" in checkpoints.error
    assert checkpoints.failing
    assert checkpoints.steps() == [1, 2, 3]  # older ones stay until a newer one is good
    checkpoints.save(state, 4, RECORD, SCHEDULE)
    assert checkpoints.wait()
    assert names(workdir) == ["4"]
    checkpoints.close()


def test_a_save_that_the_disk_has_no_room_for_is_not_begun(workdir, mesh, monkeypatch):
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    checkpoints.save(first_state(SETTINGS, mesh), 4, RECORD, SCHEDULE)
    assert not checkpoints.wait()
    assert checkpoints.error == "the disk does not have enough room for it"
    checkpoints.close()


def test_a_step_that_is_bad_on_disk_at_once_does_not_drive_out_a_good_one(workdir, mesh, monkeypatch):
    checkpoints = Checkpoints(workdir, CheckpointSettings(keep=1))
    written = manifest.write_manifest

    def write_and_damage(folder):
        written(folder)
        (folder / "record/metadata").write_text("{}")

    monkeypatch.setattr(manifest, "write_manifest", write_and_damage)
    checkpoints.save(first_state(SETTINGS, mesh), 4, RECORD, SCHEDULE)
    assert not checkpoints.wait()
    assert names(workdir) == ["1", "2", "3", "4.damaged"]
    checkpoints.close()


def test_steps_that_a_run_went_back_from_are_set_aside(workdir):
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    checkpoints.undo(after=1)
    assert names(workdir) == ["1", "2.undone", "3.undone"]
    assert checkpoints.newest_good() == 1
    checkpoints.close()
