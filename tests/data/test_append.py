"""Stores that are added to, and prepares that are killed: what was finished stays as it is, bit for bit."""

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from tests import forked
from tests.command import ROOT
from tests.data.test_parts import assert_equal, contents, made, written
from tests.data.texts import TEXTS, settings_for
from tvq_pod.data import cut as cut_module
from tvq_pod.data import open as open_module
from tvq_pod.data import part as part_module
from tvq_pod.data import part_workers as part_workers_module
from tvq_pod.data.append import append
from tvq_pod.data.corpora import documents_of
from tvq_pod.data.cut import signature
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.open import open_store
from tvq_pod.data.sources import listing
from tvq_pod.data.store import TokenStore
from tvq_pod.data.vocab import N_SPECIAL, ByteVocab
from tvq_pod.errors import UserError

OLD = ROOT / "tests/data/old_store"  # of the first twelve TEXTS, made by the version before there were parts
OLD_FINGERPRINT = "317781e72a62e60a4c0c7ad9ffde4ccdf74439c0bba9c89ca4d7cf2cb3f8227c"
MORE = [f"more of it, number {n}. " * (2 + n % 9) for n in range(30)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cut_module, "PART_BYTES", 1500)


def files_below(path) -> dict[str, tuple]:
    """Content and identity of each file of a store, but of its store.json."""
    return {
        str(file.relative_to(path)): (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns)
        for file in sorted(pathlib.Path(path).rglob("*"))
        if file.is_file() and file != pathlib.Path(path) / "store.json"
    }


def added(source, folder, **changes) -> TokenStore:
    data = dict(prepare_processes=1, store=str(folder)) | changes
    return append(settings_for(source, **data), epath.Path(f"{folder}.run"))


@pytest.fixture
def lines(tmp_path) -> pathlib.Path:
    """A folder with a file that becomes several parts."""
    (tmp_path / "lines").mkdir()
    written(tmp_path / "lines/a.txt", "lines", TEXTS[:40])
    return tmp_path / "lines"


# ------------------------------------------------- adding
@pytest.mark.slow(2)
@pytest.mark.parametrize("n_parts", ["one", "several"])
def test_new_files_become_new_parts_and_old_ones_stay_as_they_are(lines, tmp_path, n_parts, monkeypatch):
    if n_parts == "one":
        monkeypatch.setattr(cut_module, "PART_BYTES", 2**28)
    store = made(lines, tmp_path / "s", format="lines")
    assert (store.n_parts > 1) == (n_parts == "several")
    before, known = files_below(store.path), contents(store)
    written(lines / "b.txt", "lines", MORE)
    monkeypatch.setattr(cut_module, "PART_BYTES", 1500)
    now = added(lines, tmp_path / "s", format="lines")
    assert now.n_parts > store.n_parts + 1
    assert now.fingerprint != store.fingerprint
    assert {name: file for name, file in files_below(store.path).items() if name in before} == before
    whole = contents(now)
    together = made(lines, tmp_path / "whole", format="lines")
    assert_equal(whole, contents(together))  # here, new files are the last ones, as they are in the listing
    # what was there is still there, under its old name
    assert_equal(contents(now.as_of(store.fingerprint)), known)
    assert_equal(contents(TokenStore(tmp_path / "s").as_of(store.fingerprint)), known)
    assert_equal(contents(store), known)  # one that was open meanwhile
    assert now.as_of("another") is None
    # the run's own source still fits, and nothing is added twice, however it is named and wherever it lies
    shutil.copytree(lines, tmp_path / "moved")
    for same in (f"{lines}/a.txt,{lines}/b.txt", tmp_path / "moved"):
        assert added(same, tmp_path / "s", format="lines").fingerprint == now.fingerprint
    assert open_store(settings_for(lines, store=str(tmp_path / "s"), format="lines"), epath.Path(tmp_path))
    assert added(lines, tmp_path / "s", format="lines").fingerprint == now.fingerprint


def test_a_store_may_be_added_to_again_and_from_another_folder(lines, tmp_path):
    store = made(lines, tmp_path / "s", format="lines")
    fingerprints = [store.fingerprint]
    for name, texts in (("x", MORE[:10]), ("y", MORE[10:])):
        other = tmp_path / name
        other.mkdir()
        written(other / "a.txt", "lines", texts)
        fingerprints.append(added(other, tmp_path / "s", format="lines").fingerprint)
        open_store(settings_for(other, store=str(tmp_path / "s"), format="lines"), epath.Path(tmp_path))
    now = TokenStore(tmp_path / "s")
    assert [fingerprint for fingerprint, _ in now.versions] == fingerprints
    sizes = [now.as_of(fingerprint).meta["splits"]["train"]["n_tokens"] for fingerprint in fingerprints]
    assert sizes == sorted(set(sizes))
    for fingerprint, size in zip(fingerprints, sizes, strict=True):
        earlier = now.as_of(fingerprint)
        assert earlier.fingerprint == fingerprint
        assert earlier.split("train").documents.n_tokens == size
    with pytest.raises(UserError, match=r"config.data.source=.*nowhere: the store .*/s was prepared with .*lines"):
        open_store(settings_for(tmp_path / "nowhere", store=str(tmp_path / "s"), format="lines"), epath.Path(tmp_path))


def test_a_mixture_is_found_as_it_was(lines, tmp_path):
    one = made(lines, tmp_path / "s", format="lines")
    two = made(lines, tmp_path / "t", validation_share=0.1, format="lines")
    text = f"{one.path}=1,{two.path}=3"
    with pytest.raises(UserError, match="holds out"):
        Mixture.open(text)
    two = made(written(tmp_path / "two.txt", "lines", MORE), tmp_path / "u", format="lines")
    text = f"{one.path}=1,{two.path}=3"
    before = Mixture.open(text)
    written(lines / "b.txt", "lines", MORE[:9])
    added(lines, tmp_path / "s", format="lines")
    now = Mixture.open(text)
    assert now.fingerprint != before.fingerprint
    earlier = now.as_of(before.fingerprint)
    assert_equal(contents(earlier), contents(before))
    assert len(now.versions) == 2


def test_what_can_not_be_added_is_refused_in_one_line(lines, tmp_path):
    store = made(lines, tmp_path / "s", format="lines")
    before = files_below(tmp_path / "s")

    def refused(match, source=lines, folder=tmp_path / "s", **changes):
        with pytest.raises(UserError, match=match) as raised:
            added(source, folder, **(dict(format="lines") | changes))
        assert "\n" not in str(raised.value)

    refused(r"config.data.store=.*nowhere: does not exist, and --append", folder=tmp_path / "nowhere")
    refused(r"config.data.test_share=0.3: the store .* was prepared with 0.1", test_share=0.3)
    refused(r"config.data.holdout=test: means test for .*held out by hash", holdout="test")
    refused(r"config.data.source=stdlib: --append adds files", source="stdlib", format="auto")
    refused(r"config.data.source=.*: contains .*which would be read as text", source=tmp_path)
    with (lines / "a.txt").open("a") as file:
        file.write("a line more\n")
    refused(r"config.data.source=.*: a.txt had [0-9,]+ bytes when .* read it, and has [0-9,]+ now")
    assert files_below(tmp_path / "s") == before
    assert TokenStore(tmp_path / "s").fingerprint == store.fingerprint


def test_a_file_of_the_name_and_the_size_of_another_is_named(lines, tmp_path, capsys):
    made(lines, tmp_path / "s", format="lines")
    other = tmp_path / "other"
    other.mkdir()
    size = (lines / "a.txt").stat().st_size
    (other / "a.txt").write_text("x" * (size - 1) + "\n")
    added(other, tmp_path / "s", format="lines")
    said = capsys.readouterr().err
    assert f"1 files have the name and size of files that {tmp_path}/s read from another place" in said
    assert f"({other}/a.txt)" in said


def test_a_name_that_is_not_utf8_is_known_again(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    for n, name in enumerate((b"caf\xe9.txt", b"b.txt")):
        pathlib.Path(os.fsdecode(os.fsencode(tmp_path / "c") + b"/" + name)).write_text(TEXTS[n] * 200)
    store = made(tmp_path / "c", tmp_path / "s", validation_share=0.0, test_share=0.0)
    assert store.n_parts == 2
    added(tmp_path / "c", tmp_path / "s", validation_share=0.0, test_share=0.0)
    assert "nothing is added" in capsys.readouterr().err
    assert TokenStore(tmp_path / "s").fingerprint == store.fingerprint


def test_a_part_without_its_list_of_files_is_damaged(lines, tmp_path):
    store = made(lines, tmp_path / "s", format="lines")
    (store.path / store.parts[1].folder / "files.json").unlink()
    with pytest.raises(UserError, match=r"files.json is missing, so the store is damaged"):
        added(lines, tmp_path / "s", format="lines")


def test_a_store_that_does_not_say_how_it_holds_out_does_so_by_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, tmp_path / "s")
    (tmp_path / "book.txt").write_text(TEXTS[20] * 20)
    with pytest.raises(UserError, match=r"config.data.holdout=auto: means position for book.txt.* held out by hash"):
        added("book.txt", "s")


def test_a_file_that_is_replaced_while_its_parts_wait_ends_the_prepare(tmp_path, monkeypatch):
    source = written(tmp_path / "a.txt", "lines", TEXTS)
    write_part, written_parts = part_module.write_part, []

    def replaced_after(task, vocab, tell):
        write_part(task, vocab, tell)
        written_parts.append(task)
        source.write_text(source.read_text().replace("document", "DOCUMENT"))

    monkeypatch.setattr(part_workers_module, "write_part", replaced_after)
    with pytest.raises(UserError, match=r"config.data.source=.*a.txt: changed while it was read"):
        made(source, tmp_path / "s", format="lines")
    assert len(written_parts) == 1
    assert not TokenStore.exists(tmp_path / "s")


def test_a_file_that_changes_while_it_is_read_ends_the_prepare_of_one_part(tmp_path, monkeypatch):
    source = written(tmp_path / "a.txt", "lines", TEXTS[:5])
    monkeypatch.setattr(cut_module, "PART_BYTES", 2**27)

    def replaced_after_the_first(*given):
        for document in documents_of(*given):
            yield document
            source.write_text("".join(f"{text}!\n" for text in TEXTS[:5]))

    with monkeypatch.context() as patch:
        patch.setattr(open_module, "documents_of", replaced_after_the_first)
        with pytest.raises(UserError, match=r"config.data.source=.*a.txt: changed while it was read"):
            made(source, tmp_path / "s", format="lines")
    assert not TokenStore.exists(tmp_path / "s")
    assert_equal(
        contents(made(source, tmp_path / "s", format="lines")), contents(made(source, tmp_path / "t", format="lines"))
    )


@pytest.mark.parametrize("change", [dict(format="text"), dict(holdout="position")])
def test_a_part_is_written_again_if_auto_means_something_else_now(tmp_path, change):
    data = settings_for(written(tmp_path / "a.jsonl", "jsonl", TEXTS[:5])).data
    found = listing(data)
    task = part_module.PartTask.of(tmp_path / "part-00000", found.files, signature(found.files), found, data, 0)
    part_module.write_part(task, ByteVocab(), lambda n: None)
    assert task.is_done(ByteVocab())
    changed = dataclasses.replace(task, listing=dataclasses.replace(task.listing, **change))
    assert not changed.is_done(ByteVocab())


# ------------------------------------------------- stores of before
def test_a_store_of_a_version_without_parts_is_read_and_added_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, tmp_path / "s")
    (tmp_path / "corpus").mkdir()
    for n, text in enumerate(TEXTS[:12]):
        (tmp_path / f"corpus/{n:02d}.txt").write_text(text)
    store = open_store(settings_for("corpus", store="s"), epath.Path("run"))
    assert store.fingerprint == OLD_FINGERPRINT
    known = contents(store)
    read = b"".join(bytes((part[0][part[0] >= N_SPECIAL] - N_SPECIAL).astype(np.uint8)) for part in known.values())
    assert sorted(read.decode()) == sorted("".join(TEXTS[:12]))
    for same in ("corpus", "corpus/", f"{tmp_path}/corpus"):
        with pytest.raises(UserError, match=rf"config.data.source={same}: an older version made s from it"):
            added(same, "s")
    before = files_below("s")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/x.txt").write_text(TEXTS[20])
    now = added("more", "s", holdout="hash")
    assert now.n_parts == 2
    assert_equal(contents(now.as_of(OLD_FINGERPRINT)), known)
    after = files_below("s")
    assert {name: after[name] for name in before} == before


# ------------------------------------------------- killed
def struck(mode, source, store, n_calls) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.data.killed_prepare", mode, str(source), str(store), str(n_calls)]
    process = forked.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode, out


def finished(folder) -> dict[str, tuple]:
    """The files of parts that are whole."""
    found = files_below(folder) if folder.exists() else {}
    return {name: file for name, file in found.items() if ".preparing" not in name and f"{name.split('/')[0]}" != name}


def check_killed(mode, source, store, expected, stride) -> None:
    """Strikes before each `stride`-th call, again and again from the beginning, and goes on after each."""
    untouched = store.with_name("untouched")
    if store.exists():
        shutil.copytree(store, untouched)
    _, n_calls = struck(mode, source, store, 0)
    assert int(n_calls) > 15
    kept = []
    for number in range(1, int(n_calls) + 1, stride):
        for path in store.parent.glob("s*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if untouched.exists():
            shutil.copytree(untouched, store)
        old = TokenStore(store).fingerprint if untouched.exists() else None
        code, _ = struck(mode, source, store, number)
        assert code == -signal.SIGKILL
        if TokenStore.exists(store):  # a store that is there is whole: what it was, or what it will be
            assert TokenStore(store).fingerprint in (old, expected.fingerprint)
            contents(TokenStore(store))
        parts = finished(store if untouched.exists() else store.with_name("s.preparing"))
        assert struck(mode, source, store, 0)[0] == 0
        after = finished(store)
        assert {name: after[name] for name in parts} == parts
        assert TokenStore(store).fingerprint == expected.fingerprint
        assert_equal(contents(TokenStore(store)), contents(expected))
        kept.append(len(parts))
        assert not [path for path in store.parent.glob("s.*") if path.name not in ("s.run", "s.lock")]
        assert not [path.name for path in store.iterdir() if "prep" in path.name or "lock" in path.name]
    assert max(kept) > 0


@pytest.mark.slow(1)
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_prepare_that_is_killed_anywhere_keeps_the_parts_that_are_whole(lines, tmp_path, stride):
    written(lines / "a.txt", "lines", TEXTS[:22])
    expected = made(lines, tmp_path / "expected", format="lines")
    check_killed("prepare", lines, tmp_path / "s", expected, stride)


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_an_addition_that_is_killed_anywhere_leaves_the_store_as_it_was_or_will_be(lines, tmp_path, stride):
    written(lines / "a.txt", "lines", TEXTS[:12])
    expected = made(lines, tmp_path / "expected", format="lines")
    made(lines, tmp_path / "s", format="lines")
    written(lines / "b.txt", "lines", MORE[:24])
    expected = added(lines, tmp_path / "expected", format="lines")
    check_killed("append", lines, tmp_path / "s", expected, stride)


def test_only_the_part_of_a_file_that_changed_is_written_again(tmp_path, monkeypatch):
    source = tmp_path / "corpus"
    source.mkdir()
    for n in range(6):
        (source / f"{n}.txt").write_text(f"{n}" * 1600)

    def killed(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda a, b: killed(a, b) if str(b).endswith("/s") else os.replace(a, b))
        with pytest.raises(KeyboardInterrupt):
            made(source, tmp_path / "s")
    before = files_below(tmp_path / "s.preparing")
    (source / "3.txt").write_text("x" * 1600)
    (tmp_path / "s.preparing/store.json").unlink()  # else it is a store that only lacks its name
    asked, write = [], part_module.StoreWriter

    def asks(path, *given, **more):
        asked.append(path.name)
        return write(path, *given, **more)

    monkeypatch.setattr(part_module, "StoreWriter", asks)
    made(source, tmp_path / "s")
    assert asked == ["part-00003"]
    after = files_below(tmp_path / "s")
    assert {name for name, file in before.items() if after.get(name) != file} == {
        name for name in before if name.startswith("part-00003/") or name == "progress.json"
    }


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_is_killed_and_their_parts_are_written_by_others(tmp_path):
    source = written(tmp_path / "a.txt", "lines", [f"{n} " * 200 for n in range(7_000)])
    program = (
        "import sys; from etils import epath; from tests.data.texts import settings_for; from tvq_pod.data import cut;"
        "from tvq_pod.data.open import open_store; cut.PART_BYTES = 2**20;"
        "open_store(settings_for(sys.argv[1], store=sys.argv[2], format='lines', prepare_processes=2), epath.Path('r'))"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "s")]
    process, draft = subprocess.Popen(command, cwd=ROOT), tmp_path / "s.preparing"
    while len([*draft.glob("part-?????/store.json")]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    workers = [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    parts = finished(draft)
    again = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _, err = again.communicate()
    assert again.returncode == 0, err
    assert "parts are complete" in err
    after = finished(tmp_path / "s")
    assert {name: after[name] for name in parts} == parts
    assert not [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]
    subprocess.run([*command[:-1], str(tmp_path / "t")], cwd=ROOT, check=True)
    assert TokenStore(tmp_path / "t").fingerprint == TokenStore(tmp_path / "s").fingerprint


@pytest.mark.slow
def test_two_prepares_at_once_make_one_store(lines, tmp_path):
    expected = made(lines, tmp_path / "expected", format="lines")
    command = [sys.executable, "-m", "tests.data.killed_prepare", "prepare", str(lines), str(tmp_path / "s"), "0"]
    both = [forked.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("preparing" in text.replace("is preparing", "") for text in said) == [False, True]
    assert TokenStore(tmp_path / "s").fingerprint == expected.fingerprint
