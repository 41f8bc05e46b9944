"""Optional packages: which extra brings which, and what is said where one is missing."""

import importlib.metadata
import importlib.util
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.command import ROOT
from tvq_pod.errors import UserError
from tvq_pod.host import extras
from tvq_pod.host.extras import EXTRAS, is_installed, require

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL: dict[str, list[str]] = {
    str(canonicalize_name(extra)): packages  # as they are spelled in the metadata of the package
    for extra, packages in PROJECT["optional-dependencies"].items()
}


def brought_by(extra: str) -> set[str]:
    """The distributions that an extra of pyproject.toml names, and those that it gets by an extra of another, as
    jax[tpu] gets libtpu."""
    found = set()
    for wanted in map(Requirement, OPTIONAL[extra]):
        found.add(wanted.name)
        for own in wanted.extras:
            needs = map(Requirement, importlib.metadata.requires(wanted.name) or [])
            found |= {need.name for need in needs if need.marker and need.marker.evaluate(dict(extra=own))}
    return found


def test_each_optional_package_is_brought_by_its_extra():
    distributions = importlib.metadata.packages_distributions()
    for package, extra in EXTRAS.items():
        assert set(distributions[package]) & brought_by(extra), f"{package} is not in [{extra}]"


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    require("pyarrow", "config.data.source=a.parquet: Parquet")
    assert is_installed("pyarrow")
    assert not is_installed("no_such_package_anywhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        require("pyarrow", "config.data.source=a.parquet: Parquet")
    assert str(refused.value) == "config.data.source=a.parquet: Parquet needs pip install -e '.[data]'"
    monkeypatch.setattr(extras, "_IN_CLONE", False)
    with pytest.raises(UserError) as refused:
        require("pyarrow", "config.data.source=a.parquet: Parquet")
    assert str(refused.value) == "config.data.source=a.parquet: Parquet needs pip install 'tvq_pod[data]'"
