"""Which flags belong to which modes, and what to say about a wrong flag.

A flag that a mode would ignore is refused, so that nobody relies on it.
"""

import difflib
import re
from collections.abc import Iterable

from tvq_pod.config.names import GROUPS
from tvq_pod.errors import UserError

MODES_OF = {  # by flag; all other flags are for every mode
    "append": ("prepare",),
    "runner": ("prepare",),
    "beam_options": ("prepare",),
    "split": ("eval",),
    "per_document": ("eval",),
    "suite": ("eval",),
    "step": ("train", "eval", "lm_eval", "sample", "inspect", "export"),
    "prompt": ("sample",),
    "prompt_file": ("sample",),
    "output": ("sample",),
    "tasks": ("lm_eval",),
    "num_fewshot": ("lm_eval",),
    "limit": ("lm_eval",),
    "max_length": ("lm_eval",),
    "topology": ("plan",),
    "slices": ("plan",),
    "tokens": ("plan",),
    "sweep": ("plan",),
    "against": ("bench",),
    "lengths": ("bench",),
    "rounds": ("bench",),
    "profiler_port": ("train", "eval", "sample"),
    "to": ("export",),
    "dtype": ("export",),
    "from": ("import",),
}


def check_flags(mode: str, given: Iterable[str]) -> None:
    """Raises UserError if a flag was given that is for other modes, or for another evaluation.

    given: the names of the flags on the command line.
    """
    given = list(given)
    for name in ("split", "per_document"):
        if "suite" in given and name in given:
            raise UserError(f"--{name}: is about documents of the store; leave it out with --suite")
    for name in given:
        if mode in MODES_OF.get(name, (mode,)):
            continue
        modes = " or ".join(f"--mode={mode}" for mode in MODES_OF[name])
        raise UserError(f"--{name}: is for {modes}; leave it out with --mode={mode}")


MUST_BE = (  # what absl says of a value, and what it must be
    (r"value should be one of <(.*)>", lambda found: f"must be one of {found[1].replace('|', ', ')}"),
    (r".* is not (an? .*)", lambda found: f"must be {found[1]}"),
    (r"invalid literal for int\(\).*", lambda found: "must be an integer"),
    (r"could not convert string to float.*", lambda found: "must be a number"),
    (r".*Non-boolean argument.*", lambda found: "must be true or false"),
)


def unknown_flag(name: str, known: Iterable[str]) -> str:
    """What to say of a flag that does not exist: the setting or the flag that may be meant. known: names of flags."""
    last = name.rpartition(".")[2]
    near = [f"config.{name}"] if f"config.{name}" in _SETTINGS else _SETTINGS_BY_NAME.get(last, [])
    near = near or difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {' or '.join(f'--{other}' for other in near)}?" if near else ""
    return f"--{name}: is not a flag{meant or '; docs/using.md lists all flags, docs/settings.md all settings'}"


def illegal_value(said: str) -> str:
    """absl's message about a value that a flag does not take, "flag --NAME=VALUE: PROBLEM", in our form."""
    flag, _, problem = said.removeprefix("flag ").partition(": ")
    for pattern, must in MUST_BE:
        if found := re.fullmatch(pattern, problem):
            return f"{flag}: {must(found)}"
    return f"{flag}: {problem}"


_SETTINGS = [f"{group}.{name}" for group, names in GROUPS.items() for name in names]
_SETTINGS_BY_NAME: dict[str, list[str]] = {}
for _path in _SETTINGS:
    _SETTINGS_BY_NAME.setdefault(_path.rpartition(".")[2], []).append(_path)
