"""Which files of a folder are a corpus: links, hidden names, permissions, what is no file; with real ones on disk."""

import contextlib
import os
import pathlib
import shutil
import tempfile

import pytest
from etils import epath

from tests.common import store_of
from tests.data.texts import settings_for
from tvq_pod.config.settings import DataSettings
from tvq_pod.data.corpora import documents, files_of
from tvq_pod.data.open import check_source, open_store
from tvq_pod.errors import UserError


def names(source, **settings) -> list[str]:
    return [document.name for document in documents(DataSettings(source=str(source), holdout="hash", **settings))]


def said(source, **settings) -> str:
    found = files_of(DataSettings(source=str(source), **settings))
    return "\n".join(found.lines())


def write(root, *paths) -> pathlib.Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(f"text of {path}\n"))
    return root


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus", "a.txt", "b/c.txt", "b/d/e.md")


# ------------------------------------------------- links
def test_links_to_folders_and_files_are_followed(corpus, tmp_path):
    write(tmp_path / "elsewhere", "x.txt", "deep/y.txt")
    (corpus / "b/link").symlink_to(tmp_path / "elsewhere")
    (corpus / "one.txt").symlink_to("../elsewhere/x.txt")
    assert names(corpus) == ["a.txt", "b/c.txt", "b/d/e.md", "b/link/deep/y.txt", "b/link/x.txt", "one.txt"]


def test_a_folder_is_read_once_however_many_links_lead_to_it_and_by_its_own_name(corpus, tmp_path):
    write(tmp_path / "elsewhere", "x.txt", "inner/y.txt")
    (corpus / "a_link").symlink_to("b")  # sorts before the folder itself
    (corpus / "l1").symlink_to(tmp_path / "elsewhere")
    (corpus / "l2").symlink_to(tmp_path / "elsewhere")
    (corpus / "l3").symlink_to(tmp_path / "elsewhere/inner")
    assert names(corpus) == ["a.txt", "b/c.txt", "b/d/e.md", "l1/inner/y.txt", "l1/x.txt"]
    assert "leaves out 3 links to folders that are already read: a_link, l2, l3" in said(corpus)


def test_links_in_a_circle_end(corpus):
    (corpus / "b/d/up").symlink_to(corpus)
    (corpus / "b/parent").symlink_to("../..")
    (corpus / "b/self").symlink_to("self")
    (corpus / "gone.txt").symlink_to("nowhere.txt")
    assert names(corpus) == ["a.txt", "b/c.txt", "b/d/e.md"]
    text = said(corpus)
    assert "leaves out 2 links to a folder that contains them: b/d/up, b/parent" in text
    assert "leaves out 2 broken links" in text


# ------------------------------------------------- what is hidden, and what is no text
def test_hidden_files_and_folders_are_left_out_unless_asked_for(corpus):
    write(corpus, ".git/config", ".DS_Store", "b/.ipynb_checkpoints/n.txt")
    before = ["a.txt", "b/c.txt", "b/d/e.md"]
    assert names(corpus) == before
    hidden = ".DS_Store, .git, b/.ipynb_checkpoints"
    assert f"leaves out 3 hidden (config.data.hidden=True includes them): {hidden}" in said(corpus)
    shown = [".DS_Store", ".git/config", "a.txt", "b/.ipynb_checkpoints/n.txt", "b/c.txt", "b/d/e.md"]
    assert names(corpus, hidden=True) == shown
    assert names(corpus / ".git") == ["config"]  # asked for by its name


def test_what_was_read_and_what_was_not_is_said_by_kind(corpus):
    write(corpus, "f.txt", "g.txt", "noname", "b/pic.PNG", "lib.zip", "x/pipe.txt")
    os.mkfifo(corpus / "pipe")
    text = said(corpus, glob="**/*")
    assert "reads 7 files as text: 5 .txt (a.txt, b/c.txt, f.txt, ...); 1 .md (b/d/e.md); 1 without a suffix" in text
    assert "leaves out 2 that are not text, by their names: b/pic.PNG, lib.zip" in text
    assert "leaves out 1 neither a file nor a folder: pipe" in text
    text = said(corpus, glob="*", exclude="lib.*")
    assert "leaves out 4 that config.data.glob does not match: b/c.txt, b/pic.PNG, b/d/e.md, ..." in text
    assert "leaves out 1 by config.data.exclude: lib.zip" in text


@pytest.mark.parametrize(("exclude", "left"), [
    ("*.md", ["a.txt", "b/c.txt"]), ("d", ["a.txt", "b/c.txt"]), ("b/*", ["a.txt"]), ("b/", ["a.txt"]),
    ("**/c.txt", ["a.txt", "b/d/e.md"]), ("a.*, c.*", ["b/d/e.md"]), ("*.MD", ["a.txt", "b/c.txt", "b/d/e.md"]),
])  # fmt: skip
def test_exclude_is_a_glob(corpus, exclude, left):
    assert names(corpus, exclude=exclude) == left


def test_an_exclude_that_leaves_nothing_out_is_named(corpus):
    text = said(corpus, exclude="*.{txt,md}, d, x/*")
    unused = [line.split(": ")[1] for line in text.splitlines() if line.endswith("matches nothing")]
    assert unused == [f"{pattern} matches nothing" for pattern in ("*.{txt", "md}", "x/*")]


def test_exclude_holds_for_what_a_glob_matches(corpus):
    write(corpus, "f.txt", "g.txt")
    assert names(f"{corpus}/*.txt", exclude="a.*") == [f"{corpus}/f.txt", f"{corpus}/g.txt"]
    assert f"leaves out 1 by config.data.exclude: {corpus}/a.txt" in said(f"{corpus}/*.txt", exclude="a.*")
    with pytest.raises(UserError, match=r"source=.*: all of it is left out by config.data.exclude=\*"):
        names(f"{corpus}/*.txt", exclude="*")


@pytest.mark.parametrize("exclude", ["/etc/*", "a**/x", "../x"])
def test_an_exclude_that_is_no_pattern_is_named(corpus, exclude):
    with pytest.raises(UserError, match=r"^config.data.exclude=.*: is not a pattern"):
        names(corpus, exclude=exclude)


def test_odd_names_are_names(tmp_path):
    odd = ["a,b.txt", "line\nbreak.txt", "[x]*.txt", " space .txt", "ü漢.txt", "-rf", "%41?"]
    odd.append(os.fsdecode(b"\xff\xfe.txt"))  # not UTF-8
    write(tmp_path / "corpus, [odd]", *odd)
    assert sorted(names(tmp_path / "corpus, [odd]")) == sorted(odd)
    assert "\n" not in said(tmp_path / "corpus, [odd]").replace("\n  ", "")
    for name in odd:
        (document,) = documents(DataSettings(source=str(tmp_path / "corpus, [odd]" / name), holdout="hash"))
        assert bytes(document.text) == os.fsencode(f"text of {name}\n")


@pytest.mark.parametrize("what", ["pipe", "null"])
def test_what_is_neither_a_file_nor_a_folder_is_refused_and_not_waited_for(tmp_path, what):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "null.txt").symlink_to("/dev/null")
    for source in (tmp_path / f"{what}.txt", tmp_path / f"{what}.*"):
        with pytest.raises(UserError, match=rf"config.data.source=.*{what}.txt: is neither a file nor a folder"):
            names(source)


# ------------------------------------------------- permissions
@contextlib.contextmanager
def as_nobody():
    """Without root's right to read everything, if this is root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared():
    """A folder that any user can reach."""
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_can_not_be_read_is_an_error_that_names_it(shared):
    write(shared, "a.txt", "b/closed/c.txt", "lost+found/x", ".private/y")
    for closed in ("b/closed", "lost+found", ".private"):
        (shared / closed).chmod(0)
    with as_nobody():
        with pytest.raises(UserError, match=r"config.data.source: .*b/closed can't be read \(Permission denied\)"):
            names(shared)
        assert names(shared, exclude="b") == ["a.txt"]  # neither lost+found nor what is hidden is opened
        text = said(shared, exclude="closed")
    assert "leaves out 1 lost+found of a file system: lost+found" in text


def test_a_link_into_a_folder_that_can_not_be_read_is_an_error(shared):
    write(shared, "corpus/a.txt", "closed/in/c.txt")
    (shared / "corpus/link").symlink_to(shared / "closed/in")
    (shared / "closed").chmod(0)
    with as_nobody(), pytest.raises(UserError, match=r"config.data.source: .*corpus/link can't be read \(Permission"):
        names(shared / "corpus")


def test_a_file_that_can_not_be_read_is_an_error(shared):
    write(shared, "a.txt")
    (shared / "a.txt").chmod(0)
    for source in (shared, shared / "a.txt"):
        with as_nobody(), pytest.raises(UserError, match=r"config.data.source.*a.txt.* can't be read.*Permission"):
            names(source)


# ------------------------------------------------- this program's own files
def test_stores_and_runs_in_the_corpus_are_left_out(corpus):
    store_of(corpus / "mine/store", [b"old text"])
    write(corpus, "run/config.json", "run/checkpoints/10/x", "run/samples/1.txt")
    assert names(corpus) == ["a.txt", "b/c.txt", "b/d/e.md"]
    assert "leaves out 2 stores or runs of this program: mine/store, run" in said(corpus)
    with pytest.raises(UserError, match=r"mine/store: is a store or a run of this program, and not text"):
        names(corpus / "mine/store")


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_run_or_store_that_would_be_read_as_text_is_refused(corpus, tmp_path, through_a_link):
    inside = corpus
    if through_a_link:
        inside = tmp_path / "outside"
        write(inside, "x.txt")
        (corpus / "link").symlink_to(inside)
    settings = settings_for(corpus)
    for check in (check_source, open_store):
        with pytest.raises(UserError, match=r"config.data.source=.*: contains the token store .*/run/store, which"):
            check(settings, epath.Path(inside / "run"))
    elsewhere = settings_for(corpus, store=str(tmp_path / "store"))
    with pytest.raises(UserError, match=r"config.data.source=.*: contains --workdir=.*run, which would be read"):
        check_source(elsewhere, epath.Path(inside / "run"))
    for place, changes in ((".runs/1", {}), ("runs/1", dict(exclude="runs")), ("runs/1", dict(exclude="*/runs,runs"))):
        assert open_store(settings_for(corpus, **changes), epath.Path(inside / place)).meta["splits"]
        shutil.rmtree(inside / place.partition("/")[0])
    check_source(settings, epath.Path(tmp_path / "run"))
