"""Checkpoints: what is saved is the state of that step, and another run's checkpoint is refused by name."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.common import small_config
from tvq_pod.checkpoint import Checkpoints, model_record, run_record, sha256_of
from tvq_pod.config import MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.errors import UserError
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.train_state import abstract_train_state, create_train_state, make_train_step

SETTINGS = Settings(
    model=small_config(n_layer=1),
    train=TrainSettings(batch_size=8, update_len=8, num_steps=10),
    optimizer=OptimizerSettings(learning_rate=0.1, warmup_steps=0),
)
RECORD = run_record(SETTINGS, "bytes", "corpus-a")


@pytest.fixture(scope="module")
def mesh(eight_devices):
    return make_mesh(MeshSettings(), eight_devices)


@pytest.fixture(scope="module")
def step_fn(mesh):
    return make_train_step(SETTINGS, mesh)


def a_batch(mesh, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, size=[8, 8]).astype(np.int32)
    batch = dict(
        inputs=tokens, targets=tokens, doc_ids=np.zeros([8, 8], np.int32), loss_mask=np.ones([8, 8], np.float32)
    )
    return jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))


def test_what_is_saved_in_the_background_is_the_state_of_that_step(tmp_path, mesh, step_fn):
    """The step donates its state: a save that still reads it while the next step writes would be caught here."""
    checkpoints = Checkpoints(tmp_path)
    state, expected = create_train_state(SETTINGS, mesh), {}
    for step in range(1, 6):
        state, _ = step_fn(state, a_batch(mesh, step))
        expected[step] = sha256_of(jax.tree.map(np.array, state))
        checkpoints.save(state, step, RECORD)
    checkpoints.wait()
    assert len(set(expected.values())) == 5
    assert checkpoints.steps() == [1, 2, 3, 4, 5]
    abstract = abstract_train_state(SETTINGS, mesh)
    for step in expected:
        restored = checkpoints.restore(step, abstract)
        assert sha256_of(restored) == expected[step]
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)
        assert sha256_of(checkpoints.restore_params(step, abstract.params)) == sha256_of(restored.params)
    checkpoints.close()


def test_the_newest_steps_are_kept(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = create_train_state(SETTINGS, mesh)
    for step in (1, 2, 3, 4):
        checkpoints.save(state, step, RECORD)
        checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    assert checkpoints.pick(None) == 4
    with pytest.raises(UserError, match=r"--step=1: there are 3, 4"):
        checkpoints.pick(1)
    checkpoints.close()


def test_another_runs_checkpoint_is_refused_by_name(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(create_train_state(SETTINGS, mesh), 7, RECORD)
    checkpoints.wait()
    checkpoints.check(7, RECORD)
    checkpoints.check(7, model_record(SETTINGS, "bytes"))

    def changed(part, **changes):
        return dataclasses.replace(SETTINGS, **{part: dataclasses.replace(getattr(SETTINGS, part), **changes)})

    for other, fingerprint, message in (
        (changed("model", d_v=24), "corpus-a", "config.model.d_v=24: the checkpoint .*7 was made with 8"),
        (changed("model", n_code=6), "corpus-a", "config.model.n_code=6: .* was made with 5"),
        (changed("train", batch_size=16), "corpus-a", "config.train.batch_size=16: .* was made with 8"),
        (changed("train", update_len=4), "corpus-a", "config.train.update_len=4: .* was made with 8"),
        (changed("optimizer", name="lion"), "corpus-a", "config.optimizer.name=lion: .* was made with adamw"),
        (dataclasses.replace(SETTINGS, seed=5), "corpus-a", "config.seed=5: .* was made with 0"),
        (SETTINGS, "corpus-b", "config.data.store, fingerprint=corpus-b: .* was made with corpus-a"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.check(7, run_record(other, "bytes", fingerprint))
    with pytest.raises(UserError, match=r"config.data.vocab=pieces: .* was made with bytes"):
        checkpoints.check(7, model_record(SETTINGS, "pieces"))
    # what has no part in shapes or data may change
    checkpoints.check(7, run_record(changed("model", p_dropres=0.5, block_len=2), "bytes", "corpus-a"))
    checkpoints.close()


def test_no_checkpoint_is_an_error_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"--workdir=.*: has no checkpoint; train there first"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        Checkpoints(tmp_path, read_only=True).pick(None)


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
