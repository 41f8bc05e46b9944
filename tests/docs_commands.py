"""The commands that README and docs tell a reader to type, and what is wrong with them.

A command of `tvq_pod.main` is parsed as the program itself does it: flags exist and belong to the mode, the config file
is read, settings exist, values have their types and bounds, and sizes agree with each other. Nothing is trained.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import typing

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CLOUD = re.compile(r"gs://|\bgcloud\b|\bsbatch\b|launch\.pod|\bhf:")
MARK = "<!-- cloud -->"
PLACEHOLDERS = {"CONFIG": "configs/stdlib.py"}


class Block(typing.NamedTuple):
    """Commands in one fence, or in lines that are indented."""

    page: pathlib.Path
    commands: list[str]
    has_mark: bool
    said: str  # what follows the last command: its output


def blocks(page: pathlib.Path) -> list[Block]:
    """All blocks of a page that have a command."""
    found = []
    text = page.read_text()
    for match in re.finditer(r"(?:^|\n)(?:(<!-- cloud -->)\n)?```(?:console|bash)?\n(.*?)\n```", text, re.DOTALL):
        found.append(_block(page, match[2], bool(match[1])))
    without_fences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for match in re.finditer(r"(?<=\n\n)(?:(<!-- cloud -->)\n\n)?((?:    \S.*\n)+)", without_fences):
        found.append(_block(page, re.sub(r"^    ", "", match[2], flags=re.MULTILINE), bool(match[1])))
    return [block for block in found if block.commands]


def _block(page: pathlib.Path, text: str, has_mark: bool) -> Block:
    commands, said = [], []
    is_console = text.startswith("$ ")
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\s+#\s.*", "", line.strip())
        if line.startswith("$ ") or (not is_console and re.match(PROGRAMS, line)):
            commands += re.split(r"\s+&&\s+", line.removeprefix("$ "))
            said = []
        else:
            said.append(line)
    return Block(page, commands, has_mark, "\n".join(said))


PROGRAMS = r"(?:[A-Z_]+=\S* )*(?:python3?|pip|pytest|pre-commit|gcloud|sbatch|uv|export|tensorboard|source|apt-get) "


def arguments_of(command: str, program: str = "tvq_pod.main") -> list[str] | None:
    """What follows `python -m PROGRAM`, or a launcher's `--`; None if the command is of another program."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[:3] == ["python", "-m", program]:
        return words[3:]
    if program == "tvq_pod.main" and words[:2] == ["python", "-m"] and words[2].startswith("launch.") and "--" in words:
        return words[words.index("--") + 1 :]
    return None


def mistakes(commands: list[list[str]]) -> list[str]:
    """What the program says of each command line of tvq_pod.main; "" where it has nothing to say."""
    lines = []
    for command in commands:
        command = [f"--config={PLACEHOLDERS.get(a[9:], a[9:])}" if a.startswith("--config=") else a for a in command]
        if not any(argument.startswith("--config=") for argument in command):
            command.insert(0, "--config=configs/stdlib.py")  # where the run's own would be read
        lines.append(command)
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs_commands"],
        input=json.dumps(lines), cwd=ROOT, env=environment, text=True, capture_output=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def _parse_all(commands: list[list[str]]) -> None:
    """Parses each in a fork of its own, since flags are global."""
    from absl import flags

    from tvq_pod import main
    from tvq_pod.errors import UserError

    for command in commands:
        sys.stdout.flush()
        if os.fork():
            os.wait()
            continue
        said = ""
        try:
            sys.argv = ["main", *command]  # where config_flags looks for overrides
            rest = main._parse(sys.argv)
            if rest[1:]:
                said = f"{rest[1:]}: are not flags"
            main.check_flags(main._MODE.value, [name for name in flags.FLAGS if flags.FLAGS[name].present])
            main.check_suites(main._SUITE.value or ["recall"])
            main._settings()
            said = said or ("" if main._WORKDIR.value else "has no --workdir")
        except UserError as error:
            said = str(error)
        print(json.dumps(said), flush=True)
        os._exit(0)


if __name__ == "__main__":
    _parse_all(json.load(sys.stdin))
