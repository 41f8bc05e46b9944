"""What stands around the code: the version, types for those who import it, and what hosts and editors read."""

import importlib.metadata
import re
import tomllib

import pytest
import yaml

import tvq_pod
from tests.command import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_stated_once_and_is_what_is_installed():
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tvq_pod.__version__"}
    assert importlib.metadata.version("tvq_pod") == tvq_pod.__version__, "pip install -e '.[dev]' again"


def test_the_workflow_runs_what_decides_whether_a_change_lands():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the word "on" as a truth value
    (job,) = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu")
    assert {"run": ".ci/run"} in job["steps"]
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert PROJECT["project"]["requires-python"] == f">={python}"


@pytest.mark.parametrize("tool", ["ruff check", "ruff format", "basedpyright"])
def test_commits_are_checked_by_the_tools_of_the_development_environment(tool):
    """The same program as in .ci/run, so that versions can't drift apart."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    (hook,) = [hook for hook in repository["hooks"] if hook["entry"].startswith(tool)]
    assert hook["language"] == "system"
    assert re.search(rf"^{tool}", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    dev = [line for line in PROJECT["project"]["optional-dependencies"]["dev"] if line.startswith(tool.split()[0])]
    assert len(dev) == 1


def test_a_bug_report_asks_for_what_it_takes_to_see_the_bug():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    kinds = {"input", "textarea", "dropdown", "checkboxes", "markdown"}
    assert all(field["type"] in kinds and field["attributes"]["label"] for field in form["body"])
    assert {"command", "happened", "expected", "versions"} <= set(ids)
