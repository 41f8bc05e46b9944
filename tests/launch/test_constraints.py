"""launch/constraints.txt: the versions that pods install. It must belong to pyproject.toml and cover what it leads to.

Nothing is asked of a package index: what a package needs is read from the one that is installed here, where that has
the very version of the constraints.
"""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.launch.conftest import ROOT
from tvq_pod.run import packages

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("tpu", "gcs", "data", "wandb")  # what pods install
REMEDY = "make launch/constraints.txt again, with the command in its first lines"


def requirements(*extras: str) -> list[Requirement]:
    """Of pyproject.toml, on a pod."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    pod = dict(sys_platform="linux", platform_machine="x86_64")
    found = map(Requirement, lines)
    return [requirement for requirement in found if not requirement.marker or requirement.marker.evaluate(pod)]


def constraints() -> dict[str, Version]:
    text = (ROOT / "launch/constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^\s;@/]+", line) for line in lines), "versions only"
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    return {line.partition("==")[0]: Version(line.partition("==")[2]) for line in lines}


def unmet(wanted: list[tuple[str, Requirement]], pins: dict[str, Version]) -> set[str]:
    """What the constraints lack or contradict, of requirements (each with who has it) and all that they lead to."""
    problems, seen = set(), set()
    while wanted:
        whose, requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins:
            problems.add(f"{whose} needs {name}, which is not there")
            continue
        if not requirement.specifier.contains(pins[name], prereleases=True):
            problems.add(f"{whose} needs {requirement}, and {pins[name]} is there")
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            wanted += [(name, needed) for needed in needs(name, pins[name], extra)]
    return problems


def needs(name: str, version: Version, extra: str) -> list[Requirement]:
    """Of an installed package; nothing if another version is installed, or none."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    if Version(distribution.version) != version:
        return []
    found = map(Requirement, distribution.requires or [])
    return [one for one in found if not one.marker or one.marker.evaluate(dict(extra=extra))]


def test_the_constraints_cover_what_pods_install():
    asked = [("pyproject.toml", requirement) for requirement in requirements(*EXTRAS)]
    assert not unmet(asked, constraints()), REMEDY


@pytest.mark.parametrize(
    ("name", "version", "problem"),
    [
        ("jax", "0.11.0", "pyproject.toml needs jax<0.11,>=0.10, and 0.11.0 is there"),
        ("jaxlib", None, "jax needs jaxlib, which is not there"),
        ("libtpu", None, "jax needs libtpu, which is not there"),
        ("wandb", None, "pyproject.toml needs wandb, which is not there"),
        ("aiohttp", None, "gcsfs needs aiohttp, which is not there"),
        ("numpy", "1.26.4", "pyproject.toml needs numpy>=2.0, and 1.26.4 is there"),
    ],
)
def test_what_is_missing_or_out_of_bounds_is_found(name, version, problem):
    installed = {each: Version(found) for each, found in packages.installed().items()}
    pins = constraints() | {each: installed[each] for each in ("jax", "gcsfs")}  # a package whose needs are known here
    pins |= {name: Version(version)} if version else {}
    if version is None:
        del pins[name]
    asked = [("pyproject.toml", requirement) for requirement in requirements(*EXTRAS)]
    assert problem in unmet(asked, pins)


def test_all_that_installs_on_pods_takes_the_constraints_and_the_same_extras():
    extras = ",".join(EXTRAS)
    worker, image = ((ROOT / "launch" / name).read_text() for name in ("worker.sh", "Dockerfile"))
    assert f'--constraint "$root/source/launch/constraints.txt" "$root/source[{extras}]"' in worker
    assert f"--constraint launch/constraints.txt '.[{extras}]'" in image
    assert worker.count("$root/source[") == image.count("'.[") == 1
    (command,) = re.findall(r"^# +(uv pip compile .*)$", (ROOT / "launch/constraints.txt").read_text(), re.MULTILINE)
    assert re.findall(r"--extra=(\w+)", command) == list(EXTRAS)
    python = re.search(r"--python-version=(3\.\d+)", command)[1]
    assert f"FROM python:{python}-slim" in image
    assert f"--python {python}" in worker
    assert re.search(r"for candidate in (\S+)", worker)[1] == f"python{python}"
    assert command in (ROOT / "docs/launch.md").read_text()


def test_jax_is_bounded_from_above_and_alike_wherever_it_is_named():
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    bounds = {str(found.specifier) for found in map(Requirement, lines) if found.name == "jax"}
    assert len(bounds) == 1
    assert SpecifierSet(*bounds).contains(constraints()["jax"])
    assert "<" in bounds.pop()


def test_the_readme_names_the_versions_that_are_tested():
    pins = constraints()
    text = (ROOT / "README.md").read_text()
    (tested,) = re.findall(r"Tested versions: Python 3\.11 with (.*?)\.\s", text, re.DOTALL)
    named = dict(re.findall(r"([a-z-]+) ([0-9][0-9.]*[0-9])", tested))
    assert {"jax", "libtpu", "flax", "orbax-checkpoint"} <= set(named)
    assert {name: Version(version) for name, version in named.items()} == {name: pins[name] for name in named}
