"""Where modules lie, and that imports point downwards: the contracts are in pyproject.toml, for import-linter."""

import shutil
import subprocess

from tests.command import ROOT


def test_imports_point_downwards_and_there_is_no_cycle():
    program = shutil.which("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def test_every_module_lies_in_a_package_whose_name_says_what_is_in_it():
    assert {path.name for path in (ROOT / "tvq_pod").glob("*.py")} == {"__init__.py", "errors.py", "main.py"}
