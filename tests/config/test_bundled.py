"""Configs by name, as --config=stdlib: which there are, and what is said of a name that none has."""

import inspect

import pytest

from tests.command import ROOT, finish, start
from tvq_pod.config import bundled
from tvq_pod.config.bundled import config_path
from tvq_pod.config.command_line import with_config
from tvq_pod.errors import UserError

FILES = {path.stem: path for path in (ROOT / "configs").glob("*.py")}


def test_every_file_of_configs_is_found_by_its_name_and_none_has_an_argument(monkeypatch, tmp_path):
    """Where none of them can be given by a path."""
    monkeypatch.chdir(tmp_path)
    assert bundled.bundled() == FILES
    for name, path in FILES.items():
        assert config_path(name) == config_path(f"configs/{name}.py") == str(path)
        scope = {}
        exec(compile(path.read_text(), path, "exec"), scope)
        assert not inspect.signature(scope["get_config"]).parameters  # config_path says so of all of them


def test_a_file_that_exists_is_taken_before_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").mkdir()  # a folder, as of a run
    assert config_path("stdlib") == str(FILES["stdlib"])
    (tmp_path / "configs").mkdir()
    for path in ("configs/stdlib.py", "enwik8", "mine.py"):
        (tmp_path / path).write_text("")
        assert config_path(path) == path
        assert config_path(f"{path}:argument") == f"{path}:argument"


@pytest.mark.parametrize("path", ["nowhere/stdlib.py", "stdlib.py", "gs://bucket/c.py", "../configs/x.py", ""])
def test_other_paths_are_left_to_what_reads_them(path):
    assert config_path(path) == path


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("stdlb", "is not a file or a bundled config; did you mean stdlib? (bundled configs: ansible, enwik8, "),
        ("configs/xyz.py", "is not a file or a bundled config (bundled configs: ansible, enwik8, "),
        ("stdlib:small", "bundled configs take no argument; give --config=stdlib"),
    ],
)
def test_what_names_no_config_is_refused_with_those_that_there_are(config, problem, tmp_path):
    code, out, err = finish(start(f"--config={config}", f"--workdir={tmp_path}/run"))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: --config={config}: {problem}")


def test_a_name_stands_wherever_a_path_may_stand_on_the_command_line():
    path = str(FILES["stdlib"])
    before, after = ["main", "--mode", "eval"], ["--workdir=w", "--prompt=--config"]
    assert with_config([*before, "--config", "stdlib", *after]) == [*before, "--config", path, *after]
    assert with_config([*before, "-config=stdlib", *after]) == [*before, f"--config={path}", *after]
    assert with_config(["main", "--config=stdlib", "--config=long"])[1:] == [
        f"--config={path}",
        f"--config={FILES['long']}",
    ]
    assert with_config(["main", "--config"]) == ["main", "--config"]
    with pytest.raises(UserError, match="did you mean recall"):
        with_config(["main", "--config", "recal"])
