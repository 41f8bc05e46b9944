"""Standard streams that are closed, full, or read by nobody, of a real process."""

import os
import subprocess
import sys

import pytest

from tests.command import ROOT, environment

MAIN = [sys.executable, "-m", "tvq_pod.main"]
PROGRAM = """
import os, sys
from tvq_pod.host import terminal
terminal.prepare()
os.write(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), b"data")
for number in (1, 2):
    os.write(number, b"noise")  # as what is written in C does
print("a result")
print("a message", file=sys.stderr)
sys.stdout.flush()
"""


def ended(command, **streams) -> tuple[int, str]:
    """Exit code and messages of a process."""
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, text=True, timeout=300, **dict(stderr=subprocess.PIPE) | streams
    )
    return done.returncode, done.stderr


def nobody_reads() -> int:
    """A pipe's end to write to; the other is closed."""
    read, write = os.pipe()
    os.close(read)
    return write


def test_output_that_nobody_reads_ends_a_program_quietly():
    assert ended([*MAIN, "--help"], stdout=nobody_reads()) == (141, "")


def test_output_that_the_disk_has_no_room_for_is_an_error():
    with open("/dev/full", "w") as full:
        assert ended([*MAIN, "--help"], stdout=full) == (
            1,
            "error: stdout can't be written (No space left on device)\n",
        )


def test_messages_that_nobody_reads_are_no_reason_to_end_otherwise():
    flags = [*MAIN, "--mode=trian"]
    code, err = ended(flags)
    assert code == 1
    assert "--mode=trian" in err
    assert ended(flags, stderr=nobody_reads())[0] == 1
    with open("/dev/full", "w") as full:
        assert ended(flags, stderr=full)[0] == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_file_never_gets_the_number_of_a_closed_stream(closed, tmp_path):
    """What is printed would be written into it."""
    path = tmp_path / "file"
    code, _ = ended(["sh", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, PROGRAM, str(path)])
    assert code == 0
    assert path.read_bytes() == b"data"
