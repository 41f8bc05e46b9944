"""Files that are written whole or not at all: what a reader finds, and what is left when the writer fails."""

import os
import resource
import subprocess
import sys
import threading

import pytest
from etils import epath

from tests.command import ROOT
from tvq_pod.host.files import replacing, write_whole

WRITES = """
import pathlib, sys
from tvq_pod.host.files import write_whole
write_whole(pathlib.Path(sys.argv[1]), "n" * 9999)
"""
REPLACES = """
import pathlib, sys
from tvq_pod.host.files import replacing
with replacing(pathlib.Path(sys.argv[1]), by_many=True) as draft:
    draft.write_text("other")
"""


def test_a_reader_finds_the_old_content_or_the_new_never_a_part(tmp_path):
    path, contents = epath.Path(tmp_path / "a"), (b"1" * 100_000, b"2" * 50_000)
    write_whole(path, contents[0])
    ended, seen = threading.Event(), set()

    def read():
        while not ended.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        write_whole(path, contents[number % 2])
    ended.set()
    reader.join()
    assert seen <= set(contents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_is_full_leaves_the_old_content(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", WRITES, path],
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]  # what was written of the draft takes no room


def test_text_is_utf_8_whatever_the_locale_and_the_mode_is_as_asked(tmp_path):
    write_whole(tmp_path / "a", "é\n", sync=True, mode=0o600)
    assert (tmp_path / "a").read_bytes() == "é\n".encode()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_of_many_writers_each_has_a_draft_of_its_own(tmp_path):
    path = tmp_path / "a"
    with replacing(path, by_many=True) as draft:
        draft.write_text("ours")
        subprocess.run([sys.executable, "-c", REPLACES, path], env=os.environ | dict(PYTHONPATH=str(ROOT)), check=True)
        assert path.read_text() == "other"
        assert draft.read_text() == "ours"
    assert path.read_text() == "ours"


def test_a_block_that_fails_replaces_nothing(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path) as draft:
        draft.with_name("nothing").rename(draft)
    assert path.read_text() == "old"
