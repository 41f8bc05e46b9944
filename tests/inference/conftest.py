"""One run, and the model of it, for all tests of what is done with a loaded model."""

import pathlib

import pytest

import tvq_pod
from tests.made_run import make_run, settings_of
from tvq_pod.inference.loaded import LoadedModel

SETTINGS = settings_of()


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "stdlib"
    workdir.mkdir()
    make_run(workdir, SETTINGS)
    return workdir


@pytest.fixture(scope="session")
def loaded(workdir) -> LoadedModel:
    """On eight devices."""
    return tvq_pod.load(workdir)
