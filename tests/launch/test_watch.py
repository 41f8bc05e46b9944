"""The babysitter: what it does about a slice that is taken back, a training that ends, and its own end."""

import collections
import os
import signal
import threading
import time

import pytest

from launch.clock import Clock
from launch.gcloud import Gcloud
from launch.machines import Machines
from launch.record import Records
from launch.watch import GivenUp, Watch
from tests.launch.cloud import pids
from tests.launch.commands import RUN, UP, WATCH, status_of


@pytest.fixture
def started(laptop):
    """A training that waits before step 8, until the test lets it go on."""
    laptop.set(wait_at=8)
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    wait_for(laptop, 7)
    return laptop


def wait_for(laptop, step: int) -> None:
    """Until the training is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if status_of(laptop)["step"] >= step:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def attempts(laptop) -> dict[int, list[str]]:
    """By attempt, the machines that it was started on."""
    found = collections.defaultdict(list)
    for name, attempt, _ in laptop.get("attempts"):
        found[attempt].append(name)
    return {attempt: sorted(names) for attempt, names in found.items()}


@pytest.mark.slow
def test_a_slice_that_is_taken_back_is_asked_for_again_and_the_run_ends(started):
    watch = started.start("watch", *WATCH)
    began = started.get("queued")["run"]["asked_at"]
    started.cloud.preempt("run", grace=0.5)
    started.set(wait_at=0)
    out, err = watch.communicate(timeout=100)
    assert watch.returncode == 0, out + err
    assert "SUSPENDED: was taken back; deleting the request, and requesting it again" in out
    assert status_of(started)["state"] == "done"
    assert started.get("queued")["run"]["asked_at"] > began
    assert all(names == ["run/0", "run/1"] for names in attempts(started).values())
    deletes = [arguments for arguments in started.get("log") if "delete" in arguments]
    assert len(deletes) == 1
    assert "--force" not in deletes[0]


@pytest.mark.slow
def test_exit_75_is_no_failure(laptop):
    laptop.set(training=[dict(steps=5, exit=75)] * 2 + [{}])
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    machines, lines = in_this_process(laptop)  # it waits half a minute, by its clock
    Watch(machines, max_restarts=0).run()
    assert sum("was preempted; starting again" in line for line in lines) >= 1
    assert sorted(attempts(laptop)) == [1, 2, 3]


@pytest.mark.slow
def test_failures_without_a_newer_checkpoint_are_few(laptop):
    """Each fails at step 8, after saving step 5: the first made progress, those that follow did not."""
    laptop.set(training=[dict(steps=8, exit=1)])
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    machines, lines = in_this_process(laptop)
    with pytest.raises(GivenUp, match="ended with 1; failed 4 times with no checkpoint after step 5"):
        Watch(machines, max_restarts=3).run()
    assert sorted(attempts(laptop)) == [1, 2, 3, 4]
    assert [line.rpartition(" in ")[2] for line in lines if "trying again" in line] == ["30 s", "60 s", "2 min"]


@pytest.mark.slow
def test_failures_with_progress_are_no_reason_to_give_up(laptop):
    laptop.set(training=[dict(steps=7, exit=1), dict(steps=12, exit=1), dict(steps=17, exit=1), {}])
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    machines, _ = in_this_process(laptop)
    Watch(machines, max_restarts=1).run()
    assert status_of(laptop)["state"] == "done"
    assert sorted(attempts(laptop)) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_checkpoint_just_before_the_end_is_progress(laptop, monkeypatch):
    """A run saves and fails between the two looks of one step: at what it says, and at its machines."""
    laptop.set(training=[dict(steps=7, exit=1), dict(steps=12, exit=1), dict(steps=17, exit=1), {}])
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    machines, _ = in_this_process(laptop)
    said, knows_machines, look, ask = [None], [False], machines.status, machines.states

    def status():
        if knows_machines[0]:
            said[0] = look()
        return said[0]

    def states(*args):
        knows_machines[0] = True
        return ask(*args)

    class Late(Watch):
        def step(self) -> float:
            knows_machines[0] = False
            return super().step()

    monkeypatch.setattr(machines, "status", status)
    monkeypatch.setattr(machines, "states", states)
    Late(machines, max_restarts=1).run()
    assert sorted(attempts(laptop)) == [1, 2, 3, 4]


def in_this_process(laptop, poll_seconds=30.0):
    """The run's machines, by a clock that only sleep moves, and what is said."""

    class Fake(Clock):
        def now(self) -> float:
            return laptop.cloud.now()

        def sleep(self, seconds: float) -> None:
            laptop.cloud.set_clock(self.now() + seconds)
            time.sleep(min(seconds, 0.05))  # the trainings are real

    lines, records = [], Records(laptop.folder / "records")
    record = records.get("run")
    gcloud = Gcloud(record.project, record.zone, say=lines.append)
    return Machines(record, records, gcloud, poll_seconds, Fake(), lines.append), lines


@pytest.fixture(autouse=True)
def _on_this_path(laptop, monkeypatch):
    for name in ("PATH", "STANDIN"):
        monkeypatch.setenv(name, laptop.environment[name])


@pytest.mark.slow
def test_a_zone_that_is_full_for_an_hour(started):
    started.cloud.preempt("run", grace=0.0)
    full_until = time.time() + 3600
    started.set(zone_full_until=full_until, wait_at=0)
    machines, lines = in_this_process(started, poll_seconds=300.0)
    Watch(machines, max_restarts=3).run()
    assert started.cloud.now() > full_until
    assert machines.record.waited > 3500
    assert lines.count("run: WAITING_FOR_RESOURCES") == 1  # not one every five minutes
    assert status_of(started)["state"] == "done"


@pytest.mark.slow
def test_requests_that_are_refused_or_fail_are_made_again(started):
    started.cloud.preempt("run", grace=0.0)
    started.set(
        create_errors=[["RESOURCE_EXHAUSTED", 'There is no more capacity in the zone "z"']] * 5
        + [["UNAVAILABLE", "try later"], ["RESOURCE_EXHAUSTED", "Quota limit 'T' has been exceeded."]],
        fails=[13, "an internal error has occurred"],
        wait_at=0,
    )
    machines, lines = in_this_process(started)
    Watch(machines, max_restarts=0).run()
    assert status_of(started)["state"] == "done"
    pauses = [line.rpartition(" in ")[2] for line in lines if "requesting it again in" in line]
    assert pauses == ["30 s", "60 s", "2 min", "4 min", "8 min", "15 min", "15 min", "15 min"]


@pytest.mark.slow
def test_a_request_that_can_never_be_granted_is_given_up(started):
    started.cloud.preempt("run", grace=0.0)
    started.set(create_errors=[["INVALID_ARGUMENT", "the accelerator was not found"]] * 9)
    machines, _ = in_this_process(started)
    with pytest.raises(GivenUp, match=r"requested a slice 3 times: .*the accelerator was not found"):
        Watch(machines, max_restarts=2).run()


@pytest.mark.slow
def test_gcloud_that_fails_in_passing_ends_nothing(started):
    """A login that expires in the night included."""
    machines, lines = in_this_process(started)
    looked = threading.Event()
    sleep = machines.clock.sleep

    def log_out(seconds):
        started.set(logged_in=looked.is_set(), ssh_failures=2, wait_at=0 if looked.is_set() else 8)
        looked.set()
        sleep(seconds)

    machines.clock.sleep = log_out
    Watch(machines, max_restarts=0).run()
    assert any("active account" in line for line in lines)
    assert status_of(started)["state"] == "done"


@pytest.mark.slow
def test_two_at_once_do_what_one_does(started):
    """The second waits, and goes on when the first is killed."""
    first = started.start("watch", *WATCH)
    assert "training" in first.stdout.readline()
    second = started.start("watch", *WATCH)
    assert "another process of this machine watches it" in second.stdout.readline()
    first.kill()
    first.communicate()
    started.cloud.preempt("run", grace=0.5)
    started.set(wait_at=0)
    out, err = second.communicate(timeout=100)
    assert second.returncode == 0, out + err
    assert status_of(started)["state"] == "done"
    assert all(names == ["run/0", "run/1"] for names in attempts(started).values())


@pytest.mark.slow(4)
def test_stop_is_stronger_than_a_watch_that_is_at_work(started):
    watch = started.start("watch", *WATCH)
    assert "training" in watch.stdout.readline()
    assert "ended; preempted" in started.must("stop", "--name=run")
    out, err = watch.communicate(timeout=60)
    assert watch.returncode == 0, err
    assert "was stopped by hand" in out
    assert sorted(attempts(started)) == [1]
    records = Records(started.folder / "records")
    stale = records.get("run")
    stale.phase = "started"  # as a watch knows it that looked before
    records.change(stale, dict(phase="prepared", saved_step=7))
    assert (stale.phase, records.get("run").phase, records.get("run").saved_step) == ("stopped", "stopped", 7)


def waiting_for_a_slice(started):
    """A watch whose slice is gone, in a zone that has no other."""
    started.cloud.preempt("run", grace=0.0)
    started.set(zone_full_until=time.time() + 1000)
    watch = started.start("watch", *WATCH)
    for line in watch.stdout:
        if "WAITING" in line:
            return watch
    pytest.fail(f"it ended: {watch.stderr.read()}")


def test_stop_before_there_is_a_slice(started):
    watch = waiting_for_a_slice(started)
    assert "is not running, its slice is WAITING_FOR_RESOURCES; watch will not start it" in started.must(
        "stop", "--name=run"
    )
    out, err = watch.communicate(timeout=60)
    assert watch.returncode == 0, err
    assert "was stopped by hand" in out
    started.set(zone_full_until=0.0)
    assert "was stopped by hand" in started.must("watch", *WATCH)
    assert sorted(attempts(started)) == [1]


@pytest.mark.slow(1)
def test_down_ends_a_watch_that_asks(started):
    watch = waiting_for_a_slice(started)
    started.must("down", "--name=run", "--yes")
    out, err = watch.communicate(timeout=60)
    assert watch.returncode == 0, err
    assert "was deleted by `down`" in out or "was stopped by hand" in out  # as `down` does first
    assert started.get("queued") == {}
    assert not [path for path in (started.folder / "records").rglob("*.json")]


@pytest.mark.slow
def test_a_slice_that_is_dead_though_its_request_is_active(started):
    """Of two slices one is taken, and the request does not say so."""
    started.set(lost_nodes=["run"])
    machines, lines = in_this_process(started)
    watch = Watch(machines, max_restarts=0)
    assert watch.step() == 0.0
    assert any("run is PREEMPTED; deleting what is left, and requesting a slice again" in line for line in lines)
    started.set(wait_at=0)
    watch.run()
    assert status_of(started)["state"] == "done"


@pytest.mark.slow
def test_a_machine_that_was_started_anew_trains_again(started):
    """Its service is gone, and nothing says with which code."""
    folder = started.cloud.machine("run", 0)
    for worker in (0, 1):
        folder = started.cloud.machine("run", worker)
        for pid in pids(folder):
            os.killpg(pid, signal.SIGKILL)
        while pids(folder):
            time.sleep(0.02)
        (folder / "home/tvq_pod/ended").unlink(missing_ok=True)
    started.set(wait_at=0)
    assert "was preempted; starting again" in started.must("watch", *WATCH)
    assert sorted(attempts(started)) == [1, 2]


@pytest.mark.slow
def test_what_was_given_up_stays_so_until_run(laptop):
    laptop.set(training=[dict(steps=3, exit=1)])
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    assert laptop.pod("watch", "--max_restarts=0", *WATCH)[0] == 1
    code, _, err = laptop.pod("watch", "--max_restarts=0", *WATCH)
    assert code == 1
    assert "gave up after 1 failures; `run` starts over" in err
    assert sorted(attempts(laptop)) == [1]


@pytest.mark.slow(1)
def test_the_log_of_a_slice_that_is_gone_is_in_the_bucket(started):
    started.set(wait_at=0)
    started.must("watch", *WATCH)
    log = started.cloud.folder / "buckets/bucket/run/logs"
    deadline = time.monotonic() + 30
    while not any("begins after step 0" in path.read_text() for path in log.glob("run-0.*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.cloud.preempt("run", grace=0.0)
    assert "begins after step 0" in started.must("logs", "--name=run")


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_a_watch_that_is_killed_at_any_point_is_started_again_and_nothing_is_lost(laptop, sign):
    """The n-th watch is killed at its n-th call of gcloud, before or after it was done; the slice is taken back once
    before the first, and once on the way."""
    laptop.set(wait_at=8)
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    wait_for(laptop, 7)
    laptop.set(wait_at=9)  # it goes on after step 7
    laptop.cloud.preempt("run", grace=0.0)
    preempted, code, out, err = False, None, "", ""
    for n in range(1, 40):
        laptop.set(calls=0, kill_at=sign * n)
        code, out, err = laptop.pod("watch", *WATCH)
        if code == 0:
            break
        assert code == -signal.SIGKILL, out + err
        running = laptop.get("queued").get("run", {}).get("state") == "ACTIVE"
        if running and not preempted and laptop.get("attempts")[-1][1] > 1 and n % 3 == 0:
            laptop.set(wait_at=0)
            laptop.cloud.preempt("run", grace=0.0)
            preempted = True
    assert code == 0, out + err
    assert preempted
    assert status_of(laptop)["state"] == "done"
    assert list(laptop.get("queued")) == ["run"]
    assert all(len(set(names)) == len(names) for names in attempts(laptop).values())  # never twice
    assert attempts(laptop)[max(attempts(laptop))] == ["run/0", "run/1"]
