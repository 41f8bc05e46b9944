"""Commands in README and docs are ones that the programs take; what needs a cloud is marked as such."""

import importlib.util
import pathlib
import re
import shlex
import tomllib

import pytest
from packaging.utils import canonicalize_name

from tests import docs_commands
from tests.command import ROOT, finish, start
from tests.docs_commands import CLOUD, PAGES, arguments_of, blocks
from tvq_pod.planning.chips import CHIPS

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block.page.name, command) for block in BLOCKS for command in block.commands]
# Commands that only a person can type, with what they need.
BY_HAND = {"export": "a shell", "source": "a shell", "python3": "a shell", "uv": "a network", "pre-commit": "git"}
# Pages that say of all their commands where they are typed.
WITHOUT_MARKS = {"launch.md", "data.md", "gpu.md"}
REFUSED = [block for block in BLOCKS if block.said.startswith("error: ") and block.page.name == "troubleshooting.md"]
OF_NO_RUN = [block for block in REFUSED if "--workdir=runs/stdlib" not in block.commands[0]]


def test_the_program_takes_every_command_line():
    given = [(page, command, arguments_of(command)) for page, command in COMMANDS]
    refused = {command for block in REFUSED for command in block.commands}
    given = [(page, command, line) for page, command, line in given if line is not None and command not in refused]
    assert len(given) > 40
    said = docs_commands.mistakes([line for _, _, line in given])
    assert len(said) == len(given)
    found = [f"{page}: {command}\n  {line}" for (page, command, _), line in zip(given, said, strict=True) if line]
    assert not found, "\n".join(found)


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--config.model.d_modle=3", "is not a setting"),
        ("--config.model.dtype=int8", "must be one of"),
        ("--stepp=3", "is not a flag"),
        ("--mode=eval --topology=v5e:2x2", "is for --mode=plan"),
        ("--config.train.update_len=100", "must divide"),
    ],
)
def test_a_command_that_the_program_would_refuse_is_found(flags, says):
    (said,) = docs_commands.mistakes([["--workdir=runs/a", *flags.split()]])
    assert says in said


def test_topologies_in_commands_are_slices_of_a_known_chip():
    named = re.findall(r"--topology=(\w+):(\S+)", " ".join(command for _, command in COMMANDS))
    assert len(named) > 4
    assert {chip for chip, _ in named} <= {*CHIPS, "cpu"}
    assert all(re.fullmatch(r"\d+(x\d+)*", shape) for _, shape in named)


@pytest.mark.parametrize("block", OF_NO_RUN, ids=lambda block: block.commands[0].split("--")[-1])
def test_an_error_in_the_docs_is_what_the_program_says(block):
    (command,) = block.commands
    code, out, err = finish(start(*arguments_of(command)))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == block.said


def test_other_commands_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        canonicalize_name(extra) for extra in project["optional-dependencies"]
    }  # old versions of pip know no other
    for page, command in COMMANDS:
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words[0] == "pip":
            for names in re.findall(r"\.\[([\w,-]+)\]", command):
                assert set(names.split(",")) <= extras, f"{page}: {command}"
        elif words[:2] == ["python", "-m"]:
            spec = importlib.util.find_spec(words[2])
            assert spec, f"{page}: {command}"
            if words[2].split(".")[0] == "tests":
                source = pathlib.Path(spec.origin).read_text()
                named = [word.split("=")[0] for word in words[3:] if word.startswith("--")]
                assert all(f'"{name}"' in source for name in named), f"{page}: {command}"
        elif words[0] == "python":
            assert words[1] == "-c" or words[1].endswith("generate.py"), f"{page}: {command}"
        elif words[0] not in BY_HAND and words[0] not in ("pytest", "apt-get"):
            assert CLOUD.search(command) or words[0] == "tensorboard", f"{page}: {command}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WITHOUT_MARKS], ids=lambda page: page.name)
def test_commands_that_need_a_cloud_are_marked(page):
    """So a reader of the source, and whoever runs them by a script, can tell."""
    for block in blocks(page):
        assert block.has_mark == any(CLOUD.search(command) for command in block.commands), block.commands
