"""What a release has besides the code: one version everywhere, a date, and the packages that it was made with."""

import datetime
import re

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tvq_pod
from tests.command import ROOT
from tests.test_project import PROJECT

CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
SECTIONS = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
RELEASED = {Version(name): date for name, date in SECTIONS if name != "Unreleased"}
VERSION = Version(tvq_pod.__version__)
LATEST = max(RELEASED)


def pins(path) -> dict[str, Version]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^\s;@/]+", line) for line in lines), "names and versions only"
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    return {line.partition("==")[0]: Version(line.partition("==")[2]) for line in lines}


def test_the_version_is_that_of_the_last_release_or_leads_to_the_next():
    assert [name for name, _ in SECTIONS[1:]] == sorted([name for name, _ in SECTIONS[1:]], key=Version, reverse=True)
    assert LATEST == VERSION or (VERSION.is_devrelease and LATEST < VERSION)
    assert all(datetime.date.fromisoformat(date) for date in RELEASED.values())


def test_the_citation_is_of_the_last_release_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # which the format requires
    assert Version(citation["version"]) == LATEST
    assert str(citation["date-released"]) == RELEASED[LATEST]
    assert citation["license"] == PROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"].removeprefix("https://arxiv.org/abs/") in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_constraints_are_versions_of_a_release(path):
    assert Version(path.stem) in RELEASED
    assert len(pins(path)) > 50


def test_the_release_has_constraints_for_all_that_it_can_be_installed_with():
    """Those of pods are among them. (.ci/run installs the wheel with them.)"""
    if VERSION.is_devrelease:
        return
    path = ROOT / "constraints" / f"{VERSION}.txt"
    pinned, project = pins(path), PROJECT["project"]
    extras = set(re.findall(r"--extra=([\w-]+)", path.read_text()))
    # beam needs an older protobuf and pyarrow than pods have.
    assert extras == set(project["optional-dependencies"]) - {"dev", "cuda", "docs", "beam"}
    wanted = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    for requirement in map(Requirement, wanted):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement
    pods = pins(ROOT / "launch/constraints.txt")
    assert pods.items() <= pinned.items()
