"""docs/settings.md, which is made from the settings in tvq_pod/config: their types, bounds, defaults and docstrings.

python -m tests.settings_docs            says whether the page is stale
python -m tests.settings_docs --write    writes it
"""

import argparse
import ast
import inspect
import itertools
import json
import pathlib
import re
import sys
import textwrap
import typing

from tvq_pod.config import Settings
from tvq_pod.config.bounds import bounds, choices, words
from tvq_pod.config.names import GROUPS, RENAMED

PAGE = pathlib.Path(__file__).parent.parent / "docs/settings.md"
COMMAND = "python -m tests.settings_docs --write"
HEAD = f"""# Settings

Made by `{COMMAND}` from
[settings.py](../tvq_pod/config/settings.py) and [model.py](../tvq_pod/config/model.py). Do not edit
it by hand.

A config file sets them as `config.train.batch_size = 64`, the command line as
`--config.train.batch_size=64`.
"""
OLD_NAMES = """
## Old names

Runs of older versions have these names in their `config.json`, which can still be read. Config
files and flags must use the current names.

| old name | current name |
| --- | --- |
"""


def page() -> str:
    """What docs/settings.md must be."""
    tables = "".join(table(path) for path in GROUPS)
    return HEAD + tables + OLD_NAMES + "".join(f"| `{old}` | `{new}` |\n" for old, new in RENAMED.items())


def table(path: str) -> str:
    """A group's part of the page. path: its name, as config.model."""
    group = group_of(path)
    hints, meaning = typing.get_type_hints(type(group), include_extras=True), meanings(type(group))
    rows = ["", f"## {path}", "", filled(linked(type(group).__doc__ or "")), ""]
    rows += ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name in GROUPS[path]:
        if f"{path}.{name}" not in GROUPS:
            default = getattr(group, name)
            text = json.dumps(default) if isinstance(default, str) else repr(default)
            cells = f"`{name}`", values(hints[name], default), f"`{text}`", linked(meaning.get(name, ""))
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def group_of(path: str):
    """The group of settings of a name, with its defaults."""
    group = Settings()
    for name in path.split(".")[1:]:
        group = getattr(group, name)
    return group


def meanings(cls: type) -> dict[str, str]:
    """The docstring below each field of a class, on one line."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def values(hint: object, default: object) -> str:
    """Which values a setting may have."""
    if known := choices(hint):
        return ", ".join(f"`{choice}`" for choice in known)
    kind = {bool: "`True`, `False`", str: "text"}.get(type(default), type(default).__name__)
    return ", ".join([kind, *map(words, bounds(hint))])


def filled(text: str) -> str:
    """Text in lines of 100 columns."""
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)


def linked(text: str) -> str:
    """Text as Markdown in a table, on a page in docs/."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text.replace("|", r"\|"))


def stale() -> str:
    """A line that says what to do if the page is not what it must be; "" if it is."""
    if PAGE.exists() and PAGE.read_text() == page():
        return ""
    return f"docs/{PAGE.name}: is not what the settings in tvq_pod/config say; run {COMMAND}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(page())
    line = stale()
    print(line or "up to date")
    sys.exit(bool(line))


if __name__ == "__main__":
    main()
