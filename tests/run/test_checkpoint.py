"""Checkpoints: what is saved is the state of that step, and another run's checkpoint is refused by name."""

import dataclasses
import resource
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.common import small_config
from tests.made_up import first_state, made_up_step
from tvq_pod.config.identity import OPTIMIZER_STATE, model_record, run_record
from tvq_pod.config.settings import CheckpointSettings, MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.host.paths import NAME_BYTES, check_saving
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run import manifest
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.hashes import sha256_of
from tvq_pod.run.step_folders import stale_steps
from tvq_pod.training.step import abstract_train_state

SETTINGS = Settings(
    model=small_config(n_layer=1),
    train=TrainSettings(batch_size=8, update_len=8, num_steps=10),
    optimizer=OptimizerSettings(learning_rate=0.1, warmup_steps=0),
)
RECORD = run_record(SETTINGS, "bytes", "corpus-a")
SCHEDULE = DataSchedule.begin(8, 8).skipping(3, 2)


@pytest.fixture(scope="module")
def mesh(eight_devices):
    return make_mesh(MeshSettings(), eight_devices)


def a_batch(mesh, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, size=[8, 8]).astype(np.int32)
    batch = dict(
        inputs=tokens, targets=tokens, doc_ids=np.zeros([8, 8], np.int32), loss_mask=np.ones([8, 8], np.float32)
    )
    return jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))


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
    with pytest.raises(UserError, match="step 3 is whole where process 0 is, and not on every host"):
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
    with pytest.raises(UserError, match=r"the full path .* has \[, with which no checkpoint can be read back"):
        check_saving("--workdir", f"{tmp_path}/lr[1e-3]")
    checkpoints.close()


@pytest.mark.slow
def test_a_checkpoint_is_told_from_others_of_its_step(tmp_path, mesh):
    """Of a run that was resumed from an older step, or started over."""
    state = first_state(SETTINGS, mesh)

    def session(begin, saved):
        checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep=0))
        checkpoints.begin(begin)
        for step in saved:
            shutil.rmtree(tmp_path / f"checkpoints/{step}", ignore_errors=True)
            checkpoints.save(state, step, RECORD, SCHEDULE)
            assert checkpoints.wait(), checkpoints.error
        names = {step: checkpoints.identity(step) for step in (1, 2, 3)}
        checkpoints.close()
        reader = CheckpointReader(tmp_path)  # as an evaluation does
        assert all(reader.identity(step) == names[step] for step in saved)
        reader.close()
        return names

    first = session(None, [1, 2])
    again = session(1, [2, 3])
    assert again[1] == first[1]
    assert again[2] != first[2]
    assert session(3, []) == again
    over = session(None, [1])
    assert {name.split("-")[0] for name in over.values()} == {"1", "2", "3"}
    assert not set(over.values()) & {*first.values(), *again.values()}


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


def test_the_newest_steps_are_kept(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep=2))
    state = first_state(SETTINGS, mesh)
    for step in (1, 2, 3, 4):
        checkpoints.save(state, step, RECORD, SCHEDULE)
        checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    assert checkpoints.pick(None) == 4
    with pytest.raises(UserError, match=r"--step=1: there are 3, 4"):
        checkpoints.pick(1)
    checkpoints.close()


def test_another_runs_checkpoint_is_refused_by_name(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep=0))
    checkpoints.save(first_state(SETTINGS, mesh), 7, RECORD, SCHEDULE)
    checkpoints.wait()
    assert checkpoints.schedule(7) == SCHEDULE
    checkpoints.check(7, RECORD)
    checkpoints.check(7, model_record(SETTINGS, "bytes"))

    def changed(part, **changes):
        return dataclasses.replace(SETTINGS, **{part: dataclasses.replace(getattr(SETTINGS, part), **changes)})

    for other, fingerprint, message in (
        (changed("model", d_v=24), "corpus-a", "config.model.d_v=24: the checkpoint .*7 was made with 8"),
        (changed("model", n_code=6), "corpus-a", "config.model.n_code=6: .* was made with 5"),
        (changed("optimizer", name="lion"), "corpus-a", "config.optimizer.name=lion: .* was made with adamw"),
        (dataclasses.replace(SETTINGS, seed=5), "corpus-a", "config.seed=5: .* was made with 0"),
        (SETTINGS, "corpus-b", "config.data.store, fingerprint=corpus-b: .* was made with corpus-a"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.check(7, run_record(other, "bytes", fingerprint))
    older = {name: RECORD[name] for name in RECORD if name not in ("config.model.window_bias", OPTIMIZER_STATE)}
    checkpoints.save(first_state(SETTINGS, mesh), 8, older, SCHEDULE)
    checkpoints.wait()
    checkpoints.check(8, RECORD)
    for step in (7, 8):
        with pytest.raises(UserError, match=r"config.model.window_bias=8.0: .* was made with 0.0"):
            checkpoints.check(step, model_record(changed("model", window_bias=8.0), "bytes"))
    with pytest.raises(UserError, match=r"config.data.vocab=pieces: .* was made with bytes"):
        checkpoints.check(7, model_record(SETTINGS, "pieces"))
    # of adafactor, the state has another form since; what evaluation and sampling need has not
    adafactor = run_record(changed("optimizer", name="adafactor"), "bytes", "corpus-a")
    older = {name: adafactor[name] for name in adafactor if name != OPTIMIZER_STATE}
    checkpoints.save(first_state(SETTINGS, mesh), 9, older, SCHEDULE)
    checkpoints.wait()
    with pytest.raises(UserError, match=r"^config.optimizer.name=adafactor: the checkpoint .*9 has .* form 1.*form 2"):
        checkpoints.check(9, adafactor)
    checkpoints.check(9, model_record(SETTINGS, "bytes"))
    # what has no part in shapes or data may change
    checkpoints.check(7, run_record(changed("model", p_dropres=0.5, block_len=2), "bytes", "corpus-a"))
    checkpoints.close()


def test_no_checkpoint_is_an_error_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"--workdir=.*: has no checkpoint; train there first"):
        CheckpointReader(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        CheckpointReader(tmp_path).pick(None)


def test_a_fingerprint_sees_every_bit_and_every_name():
    tree = dict(a=np.zeros([2, 3], np.float32), b=np.arange(3))
    same = dict(b=np.arange(3), a=np.zeros([2, 3], np.float32))
    assert sha256_of(tree) == sha256_of(same)
    others = [
        tree | dict(a=np.zeros([3, 2], np.float32)),
        tree | dict(a=-np.zeros([2, 3], np.float32)),
        tree | dict(a=np.zeros([2, 3], np.int32)),
        dict(a=tree["a"], c=tree["b"]),
    ]
    assert len({sha256_of(other) for other in [tree, *others]}) == 5


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory, mesh):
    """A folder with checkpoints 1, 2 and 3, that tests copy and damage."""
    workdir = tmp_path_factory.mktemp("three")
    checkpoints = Checkpoints(workdir, CheckpointSettings(keep=0))
    state = first_state(SETTINGS, mesh)
    for step in (1, 2, 3):
        checkpoints.save(state, step, RECORD, SCHEDULE)
        checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "run")
    return tmp_path / "run"


def damage(workdir, step):
    """One bit of an array's data, which orbax itself would restore without a word."""
    path = max((workdir / f"checkpoints/{step}/params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


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


def test_those_that_only_read_pass_over_a_damaged_step_and_leave_it_where_it_is(workdir):
    damage(workdir, 3)
    checkpoints = CheckpointReader(workdir)
    assert checkpoints.pick(None) == 2
    with pytest.raises(UserError, match="--step=3 is damaged"):
        checkpoints.pick(3)
    assert names(workdir) == ["1", "2", "3"]
    checkpoints.close()


def test_orbax_needs_nothing_that_the_manifest_leaves_out(workdir, mesh):
    for name in manifest.LEFT_OUT:
        (workdir / f"checkpoints/3/{name}").write_text("?")
    checkpoints = CheckpointReader(workdir)
    checkpoints.restore(3, abstract_train_state(SETTINGS, mesh))
    checkpoints.close()


@pytest.mark.slow
def test_a_whole_checkpoint_of_other_shapes_is_not_called_damaged(workdir, mesh):
    """As one whose record does not name the setting that makes the difference."""
    wider = dataclasses.replace(SETTINGS, model=SETTINGS.model.replace(n_code=6))
    lion = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(name="lion"))
    checkpoints = CheckpointReader(workdir)
    with pytest.raises(
        UserError, match=r"the array params/layers/unit0/quantizer/codebook has the shape \(1, 2, 5, 6\) in"
    ) as e:
        checkpoints.restore_params(3, abstract_train_state(wider, mesh).params)
    assert "not damaged" in str(e.value)
    assert "move it away" not in str(e.value)
    with pytest.raises(
        UserError, match=r"the array train/opt_state/.* has the shape .* in checkpoint 3, and none by this"
    ):
        checkpoints.restore(3, abstract_train_state(lion, mesh))
    checkpoints.close()


def test_parameters_are_read_in_another_dtype_but_training_keeps_its_own(workdir, mesh):
    """Rounded as numpy rounds; the codebook stays float32."""
    coarse = dataclasses.replace(SETTINGS, model=SETTINGS.model.replace(param_dtype="bfloat16", dtype="bfloat16"))
    checkpoints = CheckpointReader(workdir)
    checkpoints.check(3, model_record(coarse, "bytes"))
    with pytest.raises(UserError, match=r"config.model.dtype=bfloat16: .* was made with"):
        checkpoints.check(3, run_record(coarse, "bytes", "corpus-a"))
    fine = checkpoints.restore_params(3, abstract_train_state(SETTINGS, mesh).params)
    found = checkpoints.restore_params(3, abstract_train_state(coarse, mesh).params)
    assert found["embedding"].dtype == "bfloat16"
    assert found["layers"]["unit0"]["quantizer"]["codebook"].dtype == "float32"
    for coarse_leaf, fine_leaf in zip(jax.tree.leaves(found), jax.tree.leaves(fine), strict=True):
        np.testing.assert_array_equal(np.asarray(coarse_leaf), np.asarray(fine_leaf).astype(coarse_leaf.dtype))
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
    assert checkpoints.error == "the disk has not enough room for it"
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


def test_which_steps_need_not_stay():
    steps = list(range(10, 101, 10))

    def stale(losses=None, **settings):
        return stale_steps(steps, CheckpointSettings(**settings), losses or {})

    assert stale(keep=0) == []
    assert stale(keep=3) == steps[:-3]
    assert stale(keep=1, keep_every_steps=40) == [10, 20, 30, 50, 60, 70, 90]
    losses = {20: 1.5, 50: 1.2, 70: 1.3, 90: 1.4}
    assert stale(losses, keep=2, keep_best=1) == [10, 20, 30, 40, 60, 70, 80]
    assert stale(losses, keep=1, keep_best=2) == [10, 20, 30, 40, 60, 80, 90]
    assert 100 not in stale(losses, keep=1, keep_best=0)


def test_steps_that_a_run_went_back_from_are_set_aside(workdir):
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    checkpoints.undo(after=1)
    assert names(workdir) == ["1", "2.undone", "3.undone"]
    assert checkpoints.newest_good() == 1
    checkpoints.close()


@pytest.mark.slow
def test_lions_momentum_of_an_older_checkpoint_is_read(tmp_path, mesh):
    """It was kept in the parameters' dtype, and is bfloat16 now."""
    lion = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(name="lion"))
    state = first_state(lion, mesh)
    rng = np.random.default_rng(0)

    def as_it_was(leaf):
        return rng.normal(size=leaf.shape).astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf

    older = jax.tree.map(as_it_was, state.opt_state)
    checkpoints = Checkpoints(tmp_path, CheckpointSettings())
    checkpoints.save(state.replace(opt_state=older), 4, RECORD, SCHEDULE)
    assert checkpoints.wait(), checkpoints.error
    restored = checkpoints.restore(4, abstract_train_state(lion, mesh)).opt_state
    assert {leaf.dtype.name for leaf in jax.tree.leaves(restored)} == {"int32", "bfloat16"}
    rounded = jax.tree.map(lambda old, new: np.asarray(old).astype(new.dtype), older, restored)
    jax.tree.map(np.testing.assert_array_equal, restored, rounded)
    checkpoints.close()
