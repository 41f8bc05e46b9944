"""Where modules lie, and that imports point downwards: the contracts are in pyproject.toml, for import-linter."""

import ast
import shutil
import subprocess

from tests.command import ROOT


def test_imports_point_downwards_and_there_is_no_cycle():
    program = shutil.which("lint-imports")
    assert program
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def test_every_module_lies_in_a_package_whose_name_says_what_is_in_it():
    assert {path.name for path in (ROOT / "tvq_pod").glob("*.py")} == {"__init__.py", "errors.py", "main.py"}


def is_slow(node: ast.AST) -> bool:
    """Whether a test is marked as slow."""
    return any("mark.slow" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def test_every_file_of_tests_has_one_that_is_not_slow():
    """So `pytest -m "not slow"` covers all that the whole suite covers."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(paths) > 40
    for path in paths:
        tree = ast.parse(path.read_text())
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert any(not is_slow(node) for node in tests), path
        assert not any(ast.unparse(node).startswith("pytestmark") for node in tree.body), path
