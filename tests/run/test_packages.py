"""WORKDIR/packages.jsonl: which packages a run used, and a warning when they change."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from etils import epath

from tests.buckets import reached_at
from tests.command import ROOT
from tvq_pod.run import packages

OLD = {"python": "3.11.7", "jax": "0.10.1", "libtpu": "0.0.41", "numpy": "2.4.6", "tqdm": "4.67.0"}
NEW = {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6", "tqdm": "4.67.0"}


@pytest.fixture
def started(tmp_path, capfd):
    """What a start with some packages prints, and the lines that the file has then."""

    def start(step, versions):
        packages.record(epath.Path(tmp_path), step, versions)
        lines = (tmp_path / "packages.jsonl").read_text().splitlines()
        return capfd.readouterr().err, lines

    return start


def test_a_start_with_other_packages_is_recorded_and_said_once(started):
    assert started(0, OLD)[0] == ""
    said, lines = started(7, OLD)
    assert (said, len(lines)) == ("", 1)
    said, lines = started(20, NEW)
    assert len(said.splitlines()) == 1
    assert (
        "WARNING: package versions differ from the start at step 0: jax 0.10.1 -> 0.10.2, jaxlib not installed -> "
        "0.10.2, libtpu 0.0.41 -> not installed; " in said
    )
    assert [(line["step"], line["packages"]) for line in map(json.loads, lines)] == [(0, OLD), (20, NEW)]
    said, lines = started(30, NEW)
    assert (said, len(lines)) == ("", 2)
    said, _ = started(40, OLD)
    assert "differ from the start at step 20: jax 0.10.2 -> 0.10.1" in said


def test_packages_that_change_no_numbers_are_recorded_without_a_warning(started):
    started(0, OLD)
    said, lines = started(5, OLD | dict(tqdm="5.0"))
    assert (said, len(lines)) == ("", 2)


@pytest.mark.parametrize("end", ['{"step": 20, "pack', "[1]\n", '{"step": 20}\n', "\x00\x00\n"])
def test_a_damaged_line_hides_none_of_those_before(started, tmp_path, end):
    started(0, OLD)
    with open(tmp_path / "packages.jsonl", "a") as file:
        file.write(end)
    said, lines = started(30, NEW)
    assert "differ from the start at step 0: jax 0.10.1 -> 0.10.2" in said
    assert json.loads(lines[0])["packages"] == OLD
    assert json.loads(lines[-1])["step"] == 30


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path, capfd):
    (tmp_path / "packages.jsonl").mkdir()
    packages.record(epath.Path(tmp_path), 0, OLD)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"WARNING: .*/packages.jsonl cannot be updated \(.*Is a directory.*\); training continues", line
    )


def test_a_bucket_has_the_same_lines(server, monkeypatch):
    """In a process of its own: gcsfs keeps the address it began with."""
    files = reached_at(monkeypatch, server)
    code = (
        "from etils import epath; from tvq_pod.run import packages; "
        f"folder = epath.Path('gs://bucket/run'); packages.record(folder, 0, {OLD}); packages.record(folder, 9, {NEW})"
    )
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "differ from the start at step 0: jax 0.10.1 -> 0.10.2" in done.stderr
    lines = files.cat("bucket/run/packages.jsonl").decode().splitlines()
    assert [json.loads(line)["packages"] for line in lines] == [OLD, NEW]


def test_what_is_installed_is_what_pip_says():
    found = packages.installed()
    for name in ("jax", "orbax-checkpoint", "tensorboardx", "ml-collections"):
        assert found[name] == importlib.metadata.version(name)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in found)


def test_packages_that_pyproject_bounds_from_above_matter():
    """A new release of one of them is expected to change something."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounded = {re.split(r"[\[<>=]", line)[0] for line in project["dependencies"] if "<" in line}
    assert {"jax", "flax"} <= bounded <= set(packages.MATTER)


def test_the_versions_are_printed_without_jax():
    module = "tvq_pod.run.packages"
    code = f"import runpy, sys\nrunpy.run_module({module!r}, run_name='__main__')\nassert 'jax' not in sys.modules"
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"jax {importlib.metadata.version('jax')}, " in done.stdout
    assert done.stdout.startswith("python 3.")
    assert len(done.stdout.splitlines()) == 1
