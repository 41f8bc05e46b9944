"""The lock of a run's folder: one run at a time, and a dead one is no hindrance."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from tests import forked
from tests.command import ROOT
from tvq_pod.errors import UserError
from tvq_pod.run import lock as workdir_module
from tvq_pod.run.lock import locked

HOLD = """
import sys, time
from etils import epath
from tvq_pod.run.lock import locked
with locked(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A real process that holds the lock."""
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    process = forked.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, env=environment)
    assert process.stdout
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(workdir_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(workdir_module, "LEASE_SECONDS", 1.0)


def write_lock(folder, **changes):
    """A lock as a run on another host leaves it."""
    holder = dict(host="elsewhere 123", hostname="elsewhere", process=77, token="ab", beat=3) | changes
    (folder / "lock").write_bytes(workdir_module._record(holder))


def test_a_second_process_is_refused_by_name_until_the_first_is_dead(tmp_path, holder, capfd):
    with (
        pytest.raises(UserError, match=rf"is in use by another process \(process {holder.pid} on "),
        locked(epath.Path(tmp_path)),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(epath.Path(tmp_path)):
        assert f"taking over the lock {tmp_path}/lock from process {holder.pid} on" in capfd.readouterr().err
    capfd.readouterr()
    with locked(epath.Path(tmp_path)):  # the one before said goodbye
        assert "takes over" not in capfd.readouterr().err


def test_a_version_that_calls_flock_itself_and_this_one_keep_each_other_out(tmp_path, holder):
    with (tmp_path / "lock").open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.wait()
    with (tmp_path / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="is in use by another process"), locked(epath.Path(tmp_path)):
            pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = pytest.raises(UserError, match=r"--workdir=.*: can't be locked \(Function not implemented\)")
    with refused, locked(epath.Path(tmp_path)):
        pass


def test_another_host_that_gives_signs_of_life_is_not_disturbed(tmp_path, quick):
    write_lock(tmp_path)
    ended = threading.Event()

    def live():
        beat = 0
        while not ended.wait(0.1):
            beat += 1
            write_lock(tmp_path, beat=beat)

    thread = threading.Thread(target=live)
    thread.start()
    refused = pytest.raises(UserError, match=r"in use by another process \(process 77 on elsewhere\)")
    with refused, locked(epath.Path(tmp_path)):
        pass
    ended.set()
    thread.join()


def test_another_host_that_is_silent_is_dead_after_its_lease(tmp_path, quick, capfd):
    write_lock(tmp_path)
    began = time.monotonic()
    with locked(epath.Path(tmp_path)):
        assert 0.9 < time.monotonic() - began < 5
        assert "taking over the lock" in capfd.readouterr().err
    # one that has been silent for long is dead after two beats
    write_lock(tmp_path)
    long_ago = time.time() - 100
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    began = time.monotonic()
    with locked(epath.Path(tmp_path)):
        assert time.monotonic() - began < 0.9


def test_a_lock_that_is_held_shows_that_its_holder_lives(tmp_path, quick):
    with locked(epath.Path(tmp_path)):
        seen = {(tmp_path / "lock").read_text() for _ in range(20) if not time.sleep(0.02)}
    assert len(seen) > 3
    assert (tmp_path / "lock").read_text().strip() == ""


def test_a_holder_whose_lock_was_taken_over_ends(tmp_path):
    code = HOLD.replace("with locked", "import tvq_pod.run.lock as w\nw.BEAT_SECONDS = 0.1\nwith locked")
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    process = forked.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment)  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == b"held\n"
    write_lock(tmp_path)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"was taken over by process 77 on elsewhere" in err


def holder_that_ends(tmp_path, change):
    """A holder of which nobody reads the last words, after a change to its lock."""
    code = HOLD.replace("with locked", "import tvq_pod.run.lock as w\nw.BEAT_SECONDS = 0.1\nwith locked")
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    process = forked.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment)  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == b"held\n"
    assert process.stderr
    process.stderr.close()
    change()
    return process.wait(timeout=30)


def test_a_holder_ends_whether_or_not_somebody_listens(tmp_path):
    assert holder_that_ends(tmp_path, lambda: write_lock(tmp_path)) == 1


def test_a_holder_whose_lock_was_deleted_ends(tmp_path):
    """Another run may make a new one, which the kernel's lock on the old one does not keep out."""
    assert holder_that_ends(tmp_path, lambda: (tmp_path / "lock").unlink()) == 1
    assert not (tmp_path / "lock").exists()


def test_of_two_that_take_a_dead_lock_the_last_to_write_has_it(tmp_path, quick, monkeypatch):
    """On a file system whose kernel locks don't reach other hosts."""
    write_lock(tmp_path)
    monkeypatch.setattr(workdir_module, "BEAT_SECONDS", 1.0)
    writer = threading.Timer(1.1, lambda: write_lock(tmp_path, token="other", process=99))
    writer.start()  # when the lease is over, and ours is written
    with pytest.raises(UserError, match="process 99 on elsewhere"), locked(epath.Path(tmp_path)):
        pass
    writer.join()


def test_a_clock_that_was_set_makes_no_holder_dead_and_none_immortal(tmp_path, quick):
    for shift in (-1000, 1000):
        write_lock(tmp_path)
        os.utime(tmp_path / "lock", (time.time() + shift, time.time() + shift))
        began = time.monotonic()
        with locked(epath.Path(tmp_path)):
            assert 2 * workdir_module.BEAT_SECONDS < time.monotonic() - began < 5


def test_a_lock_of_which_only_a_part_was_written_is_nobodys(tmp_path):
    write_lock(tmp_path)
    old = (tmp_path / "lock").read_bytes()
    write_lock(tmp_path, process=88, token="cd", hostname="another")
    new = (tmp_path / "lock").read_bytes()
    first = next(i for i in range(len(new)) if new[i] != old[i])
    for length in (first + 1, first + 30, first + 60):
        (tmp_path / "lock").write_bytes(new[:length] + old[length:])
        with locked(epath.Path(tmp_path)):
            assert str(os.getpid()) in (tmp_path / "lock").read_text()
