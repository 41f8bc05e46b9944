"""Checkpoints for those that only read: what is refused, passed over, and read."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.made_up import first_state
from tests.run.saved import RECORD, SCHEDULE, SETTINGS, damage, names
from tvq_pod.config.identity import OPTIMIZER_STATE, model_record, run_record
from tvq_pod.config.settings import CheckpointSettings, OptimizerSettings
from tvq_pod.errors import UserError
from tvq_pod.run import manifest
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.training.step import abstract_train_state


@pytest.mark.slow(1)
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


def test_a_checkpoint_that_training_deletes_meanwhile_is_told(tmp_path, mesh):
    """An export, or tvq_pod.load, has picked it."""
    checkpoints = Checkpoints(tmp_path, CheckpointSettings())
    checkpoints.save(first_state(SETTINGS, mesh), 7, RECORD, SCHEDULE)
    checkpoints.wait()
    reader = CheckpointReader(tmp_path)
    shutil.rmtree(tmp_path / f"checkpoints/{reader.pick(None)}")
    with pytest.raises(UserError, match=r"checkpoints/7: was deleted while it was being read, .*; try again"):
        reader.restore_params(7, abstract_train_state(SETTINGS, mesh).params)
    reader.close()
    checkpoints.close()


def test_no_checkpoint_is_an_error_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"--workdir=.*: has no checkpoint; train there first"):
        CheckpointReader(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        CheckpointReader(tmp_path).pick(None)


@pytest.mark.slow(1)
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
        UserError, match=r"the array train/opt_state/.* has the shape .* in checkpoint 3 but none with this"
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
