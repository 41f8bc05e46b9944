"""tests.forked.Popen: a fork behaves as the process that Python would have started anew."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import forked
from tests.command import ROOT

PROGRAM = """
import atexit, os, signal, sys, threading, time
atexit.register(print, "at exit")
print(sys.argv, __name__, os.getcwd(), os.environ.get("GIVEN"), os.environ.get("HOME"))
print(sys.stdin.read(), sys.stdout.isatty(), os.getpid() == os.getpgid(0), os.getpid() == os.getsid(0))
print([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)])
print("an error", file=sys.stderr)
threading.Thread(target=lambda: (time.sleep(0.1), print("from a thread"))).start()
sys.stdout.flush()
"""
ENDS = {
    "return": "",
    "code": "sys.exit(3)",
    "text": "sys.exit('a reason')",
    "error": "raise ValueError('a mistake')",
    "at once": "os._exit(4)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)",
}


def ended(popen, code: str, tmp_path, **settings) -> tuple:
    """Exit code, output, and the first and last message of a program."""
    process = popen(
        [sys.executable, "-c", PROGRAM + code, "an argument", "--flag"],
        env=os.environ | dict(GIVEN="é"),
        cwd=tmp_path,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **settings,
    )
    out, err = process.communicate("given", timeout=20)
    lines = err.splitlines()
    return process.returncode, out, lines[0], lines[-1]


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("end", "settings"),
    [*((end, {}) for end in ENDS), ("return", dict(start_new_session=True)), ("return", dict(process_group=0))],
)
def test_a_fork_says_and_ends_what_a_process_that_starts_anew_does(end, settings, tmp_path):
    anew, fork = (ended(popen, ENDS[end], tmp_path, **settings) for popen in (subprocess.Popen, forked.Popen))
    assert fork == anew


def test_a_program_finds_itself_as_python_s_m_has_it():
    anew, fork = (
        popen([sys.executable, "-m", "tvq_pod.main", "--help"], cwd=ROOT, stdout=subprocess.PIPE).communicate()
        for popen in (subprocess.Popen, forked.Popen)
    )
    assert fork == anew


def test_a_fork_s_signals_and_its_end_are_seen_from_here():
    code = "import time; print('up', flush=True); time.sleep(60)"
    processes = [forked.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.stdout and process.stdout.readline() for process in processes] == ["up\n"] * 3
    assert len({process.pid for process in processes} | {os.getpid()}) == 4
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        processes[0].wait(0.2)
    assert 0.15 < time.monotonic() - began < 20
    processes[1].terminate()
    assert processes[1].wait(timeout=20) == -signal.SIGTERM
    assert [process.poll() for process in processes] == [None, -signal.SIGTERM, None]
    processes[0].send_signal(signal.SIGSTOP)
    processes[0].kill()
    processes[2].kill()
    os.kill(processes[2].pid, 0)  # until somebody asks how it ended, its process id is no other's
    assert [process.wait(timeout=20) for process in processes] == [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGKILL]


def test_the_streams_of_a_fork_end_with_it_whatever_others_go_on():
    first, second = (
        forked.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    )
    assert first.communicate(b"\n", timeout=20) == (b"", None)
    assert second.poll() is None
    second.communicate(b"\n", timeout=20)


def test_a_fork_starts_python_by_forks_and_other_programs_as_ever():
    """By forks of what has run nothing yet: a program defines its flags once."""
    flag = "from absl import flags; flags.DEFINE_bool('flag', True, 'of a program')"
    inner = f"import sys; {flag}; print(len(sys.modules) > 1000)"
    code = f"{flag}; import subprocess, sys\n" + "\n".join(
        f"print(subprocess.run({command}, stdout=subprocess.PIPE, text=True).stdout.strip(), flush=True)"
        for command in (f"[sys.executable, '-c', {inner!r}]", "['echo', 'here']")
    )
    out, _ = forked.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).communicate()
    assert out == "True\nhere\n"
