"""docs/settings.md is made from the settings, and says of each what it may be, its default and its meaning."""

import re
import sys

import pytest

from tests import settings_docs
from tvq_pod.config.names import GROUPS, RENAMED


def test_the_page_is_what_the_settings_say():
    if line := settings_docs.stale():
        pytest.fail(line, pytrace=False)


def rows(path):
    """A group's rows of the page as lists of cells."""
    (part,) = re.findall(rf"^## {re.escape(path)}\n(.*?)(?=^## |\Z)", settings_docs.PAGE.read_text(), re.M | re.S)
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("path", GROUPS)
def test_each_setting_has_a_row_with_its_meaning(path):
    found = rows(path)
    assert [row[0] for row in found] == [f"`{name}`" for name in GROUPS[path] if f"{path}.{name}" not in GROUPS]
    for _, values, default, meaning in found:
        assert values
        assert not values.startswith("`") or default.strip('`"') in values
        assert len(meaning) > 10, "write its meaning as a docstring below the field"
        assert meaning.endswith(".")


def test_rows_say_choices_bounds_and_defaults():
    assert rows("config.sample")[4][:3] == ["`top_p`", "float, above 0, at most 1", "`0.95`"]
    assert rows("config.eval")[4][:3] == ["`cache`", "`on`, `off`", '`"on"`']
    assert rows("config.metrics")[0][:3] == ["`tensorboard`", "`True`, `False`", "`True`"]
    assert rows("config")[0][:3] == ["`seed`", "int, at least 0, below 2 ** 31", "`0`"]
    assert rows("Old names") == [[f"`{old}`", f"`{new}`"] for old, new in RENAMED.items()]


def test_a_page_that_is_stale_is_told_in_one_line_with_the_command_that_writes_it(tmp_path, monkeypatch, capsys):
    page = tmp_path / "settings.md"
    monkeypatch.setattr(settings_docs, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["settings_docs"])
    told = "docs/settings.md: is not what the settings in tvq_pod/config say; run python -m tests.settings_docs --write"
    for text in (None, settings_docs.page().replace("`0.95`", "`0.9`")):
        if text:
            page.write_text(text)
        with pytest.raises(SystemExit) as end:
            settings_docs.main()
        assert (end.value.code, capsys.readouterr().out) == (1, f"{told}\n")
    monkeypatch.setattr(sys, "argv", ["settings_docs", "--write"])
    with pytest.raises(SystemExit) as end:
        settings_docs.main()
    assert (end.value.code, capsys.readouterr().out) == (0, "up to date\n")
    assert page.read_text() == settings_docs.page()
