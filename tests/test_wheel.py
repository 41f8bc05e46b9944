"""What pip installs: all of tvq_pod, configs and launch, below one name, and without a clone beside it.

.ci/run installs the wheel in an empty environment and trains with it.
"""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import tvq_pod
from tests.command import ROOT, environment

PLACES = {"tvq_pod": "tvq_pod", "configs": "tvq_pod/configs", "launch": "tvq_pod/launch"}  # here, and in the wheel
CHECK = """
import importlib, pathlib, sys
import tvq_pod
from tvq_pod.config.bundled import bundled
from tvq_pod.host.extras import install
folder = pathlib.Path(tvq_pod.__file__).parent
assert folder.is_relative_to(sys.argv[1]), folder
assert bundled() == {path.stem: path for path in (folder / "configs").glob("*.py")}
assert len(bundled()) > 5
assert install("data") == "pip install 'tvq_pod[data]'"
from tvq_pod.launch import pod, local
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, with the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PLACES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def test_the_wheel_has_every_file_of_the_product_below_one_name(wheel):
    assert wheel.name == f"tvq_pod-{tvq_pod.__version__}-py3-none-any.whl"
    expected = {
        f"{there}/{path.relative_to(ROOT / here).as_posix()}": path.read_bytes()
        for here, there in PLACES.items()
        for path in (ROOT / here).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"tvq_pod/py.typed", "tvq_pod/configs/stdlib.py", "tvq_pod/launch/worker.sh"} <= expected.keys()
    with zipfile.ZipFile(wheel) as opened:
        found = {name: opened.read(name) for name in opened.namelist() if ".dist-info/" not in name}
    assert expected.keys() == found.keys()
    assert expected == found


def test_what_it_installs_needs_no_clone(wheel, tmp_path):
    """Neither the configs nor launch are taken from another place than the wheel."""
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    where = dict(cwd=tmp_path, text=True, capture_output=True, timeout=300)
    env = environment() | dict(PYTHONPATH=str(tmp_path / "site"))
    done = subprocess.run([sys.executable, "-c", CHECK, str(tmp_path / "site")], env=env, **where)
    assert done.returncode == 0, done.stderr
    up = [
        "up",
        "--name=run",
        "--zone=us-west4-a",
        "--project=my-project-123",
        "--accelerator=v5litepod-16",
        f"--records={tmp_path}/records",
    ]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # not a repository of ours
    done = subprocess.run([sys.executable, "-m", "tvq_pod.launch.pod", *up], env=env, **where)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"error: {tmp_path}/site/tvq_pod: is not a clone of tvq_pod; " in done.stderr
