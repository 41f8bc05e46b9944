"""A file that has its name only once it is complete, whoever is killed, and whoever else writes it."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tvq_pod.host.new_file import NewFile

WRITER = """
import sys, time
from tvq_pod.host.new_file import NewFile
file = NewFile(sys.argv[1])
file.write_line("begun")
print("written", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "lines.jsonl")


def test_a_file_appears_with_all_its_lines(path):
    file = NewFile(path)
    file.write_line("one")
    assert not os.path.exists(path)
    file.write_line("two")
    file.finish()
    file.close()
    assert pathlib.Path(path).read_text() == "one\ntwo\n"
    assert os.listdir(os.path.dirname(path)) == ["lines.jsonl"]


def test_a_killed_writer_leaves_no_file_and_the_next_starts_over(path):
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        with pytest.raises(BlockingIOError):
            NewFile(path)
        writer.send_signal(signal.SIGKILL)
    assert not os.path.exists(path)
    assert pathlib.Path(f"{path}.partial").read_text() == "begun\n"
    file = NewFile(path)
    file.write_line("again")
    file.finish()
    file.close()
    assert pathlib.Path(path).read_text() == "again\n"


def test_a_file_that_came_up_meanwhile_is_kept(path):
    file = NewFile(path)
    file.write_line("mine")
    with open(path, "w") as other:
        other.write("theirs")
    with pytest.raises(FileExistsError):
        file.finish()
    file.close()
    assert pathlib.Path(path).read_text() == "theirs"
    assert pathlib.Path(f"{path}.partial").read_text() == "mine\n"


def test_who_opened_the_file_just_before_it_was_finished_does_not_empty_it(path, monkeypatch):
    first = NewFile(path)
    first.write_line("mine")

    def finishes_then_locks(file, how):
        first.finish()
        first.close()

    monkeypatch.setattr("tvq_pod.host.new_file.fcntl.flock", finishes_then_locks)
    with pytest.raises(BlockingIOError):
        NewFile(path)
    assert pathlib.Path(path).read_text() == "mine\n"
