"""The package versions that a run uses: WORKDIR/packages.jsonl has one line for each start whose packages differ from
those of the previous start, with `step`, `time` (seconds since 1970) and `packages`, which maps each name to its
version.

    python -m tvq_pod.run.packages        prints the versions that matter, on one line

Another jax or libtpu may round differently, so a run that is to be reproduced needs the packages it was trained with.
launch/constraints.txt keeps them the same on pods; this file says what they were.
"""

import importlib.metadata
import json
import platform
import re
import time

from etils import epath

from tvq_pod.host.files import write_whole
from tvq_pod.host.terminal import say

# The packages that affect a run's numbers, or the format of its files.
MATTER = (
    "python",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "numpy",
)


def installed() -> dict[str, str]:
    """The version of Python and of every installed package, by its normalized name. Imports none of them."""
    versions = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():  # of two with one name, Python imports the first
        metadata = distribution.metadata  # parsed on every access
        if name := metadata["Name"]:
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), metadata["Version"])
    return versions


def summary(versions: dict[str, str]) -> str:
    """The versions that matter, on one line: `python 3.11.7, jax 0.10.2, …`; packages that are missing are left out."""
    return ", ".join(f"{name} {versions[name]}" for name in MATTER if name in versions)


def record(workdir: epath.Path, step: int, versions: dict[str, str] | None = None) -> None:
    """Adds a line to packages.jsonl if the packages are not those of the last start, and prints a warning if a version
    that matters has changed.

    step: the step that the run resumes from. versions: by default the installed ones. A file that can't be read or
    written causes a warning, and never ends the run.
    """
    versions = installed() if versions is None else versions
    path = workdir / "packages.jsonl"
    try:
        text = path.read_text() if path.exists() else ""
        last = _last_line(text)
        if last.get("packages") == versions:
            return
        changes = _changes(last["packages"], versions) if last else []
        if changes:
            say(
                f"WARNING: package versions differ from the start at step {last['step']}: {', '.join(changes)}; the "
                f"numbers may differ in their last bits. The earlier versions are in {path}"
            )
        if text and not text.endswith("\n"):  # a truncated line
            text += "\n"
        line = json.dumps(dict(step=step, time=time.time(), packages=dict(sorted(versions.items()))))
        write_whole(path, text + line + "\n")
    except Exception as error:  # a bucket's client has its own errors
        why = " ".join(str(error).split()) or type(error).__name__
        say(f"WARNING: {path} cannot be updated ({why}); training continues")


def _last_line(text: str) -> dict:
    """The last complete line, or {}."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("packages"), dict) and "step" in found:
            return found
    return {}


def _changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    names = [name for name in MATTER if before.get(name) != now.get(name)]
    return [f"{name} {before.get(name, 'not installed')} -> {now.get(name, 'not installed')}" for name in names]


if __name__ == "__main__":
    print(summary(installed()))
