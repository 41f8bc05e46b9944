"""Checkpoints that several files of tests look at."""

import shutil

import pytest

from tests.made_up import first_state
from tests.run.saved import RECORD, SCHEDULE, SETTINGS
from tvq_pod.config.settings import CheckpointSettings, MeshSettings
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def mesh(eight_devices):
    return make_mesh(MeshSettings(), eight_devices)


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
