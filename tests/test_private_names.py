"""What other packages do not document is used in one small file a package, which names the version it was checked with.

After an upgrade of launch/constraints.txt these tests say which of those files to look at again.
"""

import importlib
import re

import pytest

from tests.command import ROOT

# For each file: what stands there, and in no other file of the program.
PRIVATE = {
    "tvq_pod.parallel.coordination": r"\bjax\._src\b",
    "tvq_pod.run.event_files": r"\btensorboardX\b|\bevent_writer\b",
    "tvq_pod.run.orbax_files": r"commit_success|orbax-checkpoint-tmp|_CHECKPOINT_METADATA|\"orbax\.\"",
}


def code_of(path) -> str:
    """Without comments and docstrings, in which such names may be explained."""
    return re.sub(r"#.*", "", re.sub(r'(?s)""".*?"""', "", path.read_text()))


@pytest.mark.parametrize("module", PRIVATE)
def test_the_file_was_checked_with_the_version_that_pods_install(module):
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "launch/constraints.txt").read_text(), re.MULTILINE))
    checked_with = importlib.import_module(module).CHECKED_WITH
    assert checked_with
    for package, version in checked_with.items():
        assert pinned[package] == version, f"read {module} again: does {package} {pinned[package]} still do so?"


@pytest.mark.parametrize("module", PRIVATE)
def test_private_names_stand_in_one_file(module):
    files = [path for folder in ("tvq_pod", "launch") for path in (ROOT / folder).rglob("*.py")]
    using = [path for path in files if re.search(PRIVATE[module], code_of(path))]
    assert [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in using] == [module]
