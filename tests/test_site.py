"""The documentation as a site: it builds without a warning, links nowhere that does not exist, and loads nothing."""

import html.parser
import shutil
import subprocess
import sys

import pytest

from tests.command import ROOT

LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


def build(folder, into):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", into]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(html.parser.HTMLParser):
    """Addresses that a browser fetches when it shows a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("rel") != "canonical":
            self.found += [given[name] for element, name in LOADS if element == tag and name in given]


@pytest.mark.slow(2)
def test_every_page_is_there_and_loads_nothing_from_the_network(site):
    pages = sorted(site.rglob("*.html"))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in pages}
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        assert parser.found, page
        assert not [address for address in parser.found if "//" in address], page
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text(), sheet
        assert "@import" not in sheet.read_text(), sheet


@pytest.mark.slow(1)
def test_the_first_page_is_the_readme_and_its_links_lead_into_the_site(site):
    page = (site / "index.html").read_text()
    assert 'href="durability.html"' in page
    assert 'src="recall.png"' in page
    assert (site / "recall.png").exists()


def test_source_files_that_pages_link_to_are_in_the_site(site):
    assert 'href="code/tvq_pod/nn/attn.py.txt"' in (site / "design.html").read_text()
    assert (site / "code/tvq_pod/nn/attn.py.txt").read_text() == (ROOT / "tvq_pod/nn/attn.py").read_text()


def test_broken_links_end_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).write_text("# A page\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("nav:\n")])
    shutil.copy(ROOT / "docs/site_hooks.py", tmp_path / "docs")
    broken = ["nowhere.md", "using.md#nothing", "../tvq_pod/none.py", "/using.md"]
    (tmp_path / "docs/using.md").write_text("# Using\n\n" + "".join(f"[a]({link}) " for link in broken))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert all(any(repr(link) in line for line in warnings) for link in broken), warnings


def test_words_are_spelled_right():
    program = shutil.which("codespell")
    assert program
    folders = ["tvq_pod", "launch", "configs", "docs", "tests", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    done = subprocess.run([program, *folders], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
