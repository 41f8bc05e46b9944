"""Links between the pages of the documentation, and from them to the code, lead somewhere."""

import re

import pytest

from tests.command import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def too_long(text: str) -> list[str]:
    """Lines of prose of more than 100 columns that have a place to break them."""
    found, fence = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = not fence
        if fence or len(line) <= 100 or re.match(r"\s*(\||!\[|#|<)", line):
            continue
        words = re.findall(r"(?:`[^`]*`|\S)+", re.sub(r"^\s*([-*]|\d+\.) ", "", line))  # a code span is a word
        if len(words) > 1:
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_wrapped_at_100_columns(page):
    assert too_long("`a b` " * 20)
    assert not too_long("- `" + "a b " * 40 + "`.")
    assert not too_long(page.read_text())


def test_design_names_every_package_and_the_paths_of_files_that_are_there():
    text = (ROOT / "docs/design.md").read_text()
    for package in (ROOT / "tvq_pod").glob("*/__init__.py"):
        assert f"[{package.parent.name}/]" in text
    for path in re.findall(r"`((?:tvq_pod|tests|launch|configs)/[\w/]+\.\w+)`", "".join(p.read_text() for p in PAGES)):
        assert (ROOT / path).exists(), path
