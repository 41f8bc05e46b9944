"""--mode=inspect: the same fingerprints as the whole state has, without ever holding it."""

import shutil
import time
import weakref
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.common import small_config
from tvq_pod.config.identity import run_record
from tvq_pod.config.settings import CheckpointSettings, MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.modes import inspect_run
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.hashes import sha256_of
from tvq_pod.training.step import create_train_state

SETTINGS = Settings(
    model=small_config(n_layer=1, n_vocab=259, param_dtype="bfloat16", dtype="bfloat16"),
    train=TrainSettings(batch_size=8, update_len=8, num_steps=10),
    optimizer=OptimizerSettings(name="adafactor"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, eight_devices):
    """A folder with one checkpoint, saved from eight devices, and its state."""
    workdir = tmp_path_factory.mktemp("run")
    state = create_train_state(SETTINGS, make_mesh(MeshSettings(), eight_devices))
    state = state.replace(step=state.step + 3)
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    checkpoints.save(state, 3, run_record(SETTINGS, "bytes", "a corpus"), DataSchedule.begin(8, 8))
    assert checkpoints.wait(), checkpoints.error
    checkpoints.close()
    return workdir, state


class OnDisk(NamedTuple):
    """The train state but its parameters, by the names that every version has hashed."""

    step: jax.Array
    opt_state: tuple
    recurrent: dict
    sanity: dict
    digest: jax.Array


@pytest.mark.slow(3)
def test_steps_that_were_set_aside_are_listed(run, tmp_path, capsys):
    workdir, _ = run
    shutil.copytree(workdir, tmp_path / "run")
    for name in ("10.undone-2", "10.undone", "9.damaged"):
        (tmp_path / "run/checkpoints" / name).mkdir()
    inspect_run.inspect(SETTINGS, tmp_path / "run", None)
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("steps: 3")
    assert lines[place + 1 : place + 3] == ["set aside: 9.damaged 10.undone 10.undone-2", "step: 3"]


@pytest.mark.slow
def test_fingerprints_are_those_of_the_whole_state(run, capsys):
    workdir, state = run
    inspect_run.inspect(SETTINGS, workdir, None)
    lines = capsys.readouterr().out.splitlines()
    assert f"parameters_sha256: {sha256_of(state.params)}" in lines
    rest = OnDisk(state.step, state.opt_state, state.recurrent, state.bad_steps, state.digest)
    assert f"train_state_sha256: {sha256_of(rest)}" in lines
    assert f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(state.params))}" in lines
    for name, leaf in (("embedding", state.params["embedding"]), ("norm_out/scale", state.params["norm_out"]["scale"])):
        (line,) = [line.split() for line in lines if line.startswith(f"{name} ")]
        assert line[1:3] == ["x".join(map(str, leaf.shape)), str(leaf.dtype)]


@pytest.mark.slow(4)
def test_one_array_is_held_at_a_time_and_none_on_a_device(run, monkeypatch):
    workdir, state = run
    restored, on_devices = [], len(jax.live_arrays())
    restore = ocp.Checkpointer.restore

    def watched(self, folder, **arguments):
        if not isinstance(arguments["args"], ocp.args.PyTreeRestore):  # the record
            return restore(self, folder, **arguments)
        deadline = time.monotonic() + 2  # a thread of orbax may be about to let go of the one before
        while (held := [array().shape for array in restored if array() is not None]) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert held == []
        tree = restore(self, folder, **arguments)
        arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
        assert len(arrays) == 1
        assert isinstance(arrays[0], np.ndarray)
        assert len(jax.live_arrays()) == on_devices
        restored.append(weakref.ref(arrays[0]))
        return tree

    monkeypatch.setattr(ocp.Checkpointer, "restore", watched)
    inspect_run.inspect(SETTINGS, workdir, 3)
    assert len(restored) == len(jax.tree.leaves(state))


def test_an_array_of_another_shape_is_no_damage(run):
    """As of a checkpoint whose record does not name the setting that makes the difference."""
    workdir, state = run
    abstract = jax.eval_shape(lambda: state).params
    abstract["embedding"] = jax.ShapeDtypeStruct([300, 8], abstract["embedding"].dtype)
    read = inspect_run._reader(workdir / "checkpoints/3/params", abstract)
    with pytest.raises(UserError, match=r"\['embedding'\] can't be read \(it has the shape \(259, 8\), but \(300, 8\)"):
        read("['embedding']")
