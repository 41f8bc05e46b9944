"""Where the time of a run goes: every second is counted once, over restarts, steps done twice, and a kill."""

import itertools
import json
import signal
import time

import pytest
from etils import epath

from tests.command import run, start
from tests.made_up import first_state, made_up_step
from tests.training.test_bad_steps import AskedAt, NoSignals, settings_for
from tvq_pod.errors import Preempted
from tvq_pod.modes import train as train_module
from tvq_pod.run import goodput as goodput_module
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.goodput_table import (
    COMPILE,
    DATA,
    END,
    EVALUATION,
    KINDS,
    REPEATED,
    RESTORE,
    SAVES,
    START,
    STEPS,
    WAITING,
    table,
)
from tvq_pod.training import restore


class Clock:
    """Dates and durations are one."""

    def __init__(self, at=0.0):
        self.at = at

    def __call__(self):
        return self.at

    def passes(self, seconds):
        self.at += seconds


def session(clock, before=None) -> Goodput:
    """One that began when the clock says."""
    goodput = Goodput(clock.at, clock, clock)
    goodput.resume(before)
    return goodput


def train(goodput, clock, first_step, last_step, seconds=1.0, to_the_end=True):
    """Steps that take so long: each is waited for once the devices have the next one. to_the_end: so is the last."""
    for step in range(first_step + 1, last_step + 1):
        goodput.begin_step(step)
        clock.passes(seconds if step > first_step + 1 else 0.0)
    clock.passes(seconds if to_the_end else 0.0)


def seconds_of(goodput) -> dict:
    """Kinds that took any time."""
    return {kind: seconds for kind, seconds in goodput.record()["seconds"].items() if seconds}


def test_each_second_is_of_one_kind_and_all_add_up():
    clock = Clock(100.0)
    goodput = Goodput(97.0, clock, clock)  # the command was given three seconds ago
    clock.passes(2)
    with goodput.on(RESTORE):
        clock.passes(7)
    with goodput.on(COMPILE):
        clock.passes(11)
    train(goodput, clock, 0, 10)
    with goodput.on(EVALUATION):
        clock.passes(3)
        with goodput.on(SAVES):  # a signal asked for it
            clock.passes(2)
        clock.passes(1)
    train(goodput, clock, 10, 12)
    goodput.end_steps(12, END)
    clock.passes(4)
    expected = {START: 5, RESTORE: 7, COMPILE: 11, STEPS: 12, EVALUATION: 4, SAVES: 2, END: 4}
    assert seconds_of(goodput) == expected
    record = goodput.record()
    assert sum(record["seconds"].values()) == clock.at - 97
    assert record["goodput"] == round(12 / 45, 4)
    assert (record["first_start"], record["until"], record["starts"], record["reached_step"]) == (97, clock.at, 1, 12)


def test_a_run_that_was_killed_trains_some_steps_twice_and_waited_in_between():
    clock = Clock()
    first = session(clock)
    train(first, clock, 0, 30, to_the_end=False)
    left = json.loads(json.dumps(first.record()))  # at step 30; the checkpoint is of step 20
    assert left["reached_step"] == 28  # nobody has looked yet whether step 29 is done
    clock.passes(100)
    second = session(clock, left)
    train(second, clock, 20, 41)
    second.end_steps(41, END)
    found = second.record()
    assert seconds_of(second) == {STEPS: 29 + 13, WAITING: 100, REPEATED: 8}
    assert (found["starts"], found["first_start"], found["until"]) == (2, 0, clock.at)
    assert sum(found["seconds"].values()) == clock.at


def test_a_run_that_saved_before_it_ended_trains_nothing_twice():
    clock = Clock()
    first = session(clock)
    train(first, clock, 0, 30)
    clock.passes(5)
    second = session(clock, first.record())
    train(second, clock, 30, 40)
    assert REPEATED not in seconds_of(second)


def test_after_a_rollback_steps_are_done_twice():
    clock = Clock()
    goodput = session(clock)
    train(goodput, clock, 0, 12)
    goodput.end_steps(12, RESTORE)
    clock.passes(4)
    train(goodput, clock, 5, 20)
    goodput.end_steps(20, END)
    assert seconds_of(goodput) == {STEPS: 12 + 8, RESTORE: 4, REPEATED: 7}


@pytest.mark.parametrize(
    "record",
    [None, {}, [], "text", dict(seconds=3), dict(seconds={}, until="x", first_start=0, starts=1, reached_step=0),
     dict(seconds={STEPS: float("nan")}, until=0, first_start=0, starts=1, reached_step=0),
     dict(seconds={STEPS: -5}, until=0, first_start=0, starts=1, reached_step=0),
     dict(seconds={STEPS: 5}, until=0, first_start=0, starts=1, reached_step=float("inf"))],
)  # fmt: skip
def test_a_record_that_is_none_or_damaged_is_as_if_there_had_been_none(record):
    clock = Clock(50.0)
    goodput = session(clock, record)
    clock.passes(2)
    assert seconds_of(goodput) == {START: 2}
    assert goodput.record()["first_start"] == 50


def of_another_version(goodput: Goodput) -> dict:
    """Its record, with one kind more and one less."""
    record = goodput.record()
    del record["seconds"][END]
    record["seconds"]["new"] = 8.0
    return record


def test_kinds_that_a_later_version_adds_or_an_earlier_one_lacks_do_not_matter():
    clock = Clock()
    first = session(clock)
    clock.passes(3)
    assert seconds_of(session(clock, of_another_version(first))) == {START: 3}


def test_a_clock_of_another_machine_that_is_behind_takes_no_time_away():
    clock = Clock(1000.0)
    first = session(clock)
    clock.passes(5)
    second = session(Clock(900.0), first.record())
    assert seconds_of(second) == {START: 5}


class Devices:
    """Stands for a step's result: ready when the test says so."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(goodput_module.jax, "block_until_ready", lambda result: result.wait(30))


def until(condition):
    """Waits for another thread, or process."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_devices_wait_for_data_only_once_they_have_nothing_to_do(monkeypatch):
    """A step takes 3 seconds, a batch 10: the devices wait for 7."""
    import threading

    Devices(monkeypatch)
    clock = Clock()
    goodput, steps = session(clock), [threading.Event() for _ in range(4)]

    def batches():
        clock.passes(2)  # the first: the devices have nothing to do
        yield 1
        for step in (0, 1):
            clock.passes(3)
            steps[step].set()
            until(lambda: goodput._devices.idle_since() == clock.at)
            clock.passes(7)
            yield 2 + step
        clock.passes(1)  # in time
        yield 4

    for step, batch in zip(itertools.count(1), goodput.fetched(batches())):
        assert batch == step
        goodput.begin_step(step)
        goodput.given(steps[step - 1])
    assert seconds_of(goodput) == {DATA: 2 + 7 + 7, STEPS: 3 + 3 + 1}
    for event in steps:
        event.set()
    goodput.close()


def test_the_table_says_what_took_time_the_longest_first():
    clock = Clock()
    goodput = session(clock)
    clock.passes(60)
    with goodput.on(COMPILE):
        clock.passes(120)
    train(goodput, clock, 0, 1, seconds=3420)
    first, *rows = table(goodput.record()).splitlines()
    assert first == "goodput 95.0%: of 1:00:00 since the first start, 1 start"
    assert [row.split() for row in rows] == [
        ["steps", "0:57:00", "95.0%"],
        ["compile", "0:02:00", "3.3%"],
        ["start", "0:01:00", "1.7%"],
    ]
    assert len(KINDS) == 11


def test_the_table_of_another_version_has_the_kinds_that_both_know():
    clock = Clock()
    goodput = session(clock)
    clock.passes(60)
    rows = table(of_another_version(goodput)).splitlines()
    assert [row.split()[0] for row in rows] == ["goodput", "steps", "start"]


def status_of(workdir):
    return json.loads((workdir / "status.json").read_text())


@pytest.mark.slow
def test_an_evaluation_that_a_start_begins_with_is_of_that_start(tmp_path, corpus, monkeypatch):
    """The session before was asked to end while it evaluated; so is this one, before its first step."""
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)
    with pytest.raises(Preempted, match="saved step 7"):
        train_module.train(settings_for(corpus), epath.Path(tmp_path), AskedAt(7))
    during = []

    def evaluate(self, state, step):
        during.append(status_of(tmp_path)["state"])
        raise Preempted(f"step {step}")

    monkeypatch.setattr(train_module._Session, "_evaluates_at", lambda self, step: step == 7)
    monkeypatch.setattr(train_module._Session, "_evaluate", evaluate)
    with pytest.raises(Preempted, match="step 7"):
        train_module.train(settings_for(corpus), epath.Path(tmp_path), NoSignals())
    assert during == ["starting"]
    assert status_of(tmp_path)["goodput"]["starts"] == 2


@pytest.mark.slow(40)
def test_a_run_that_was_killed_tells_the_time_of_all_its_sessions(tmp_path, config_file, monkeypatch):
    """kill -9 to a real process, after it has trained past its last checkpoint."""
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", "--config.metrics.tensorboard=False", "--config.sample.length=0",
             "--config.eval.at_end=False", "--config.checkpoint.every_steps=600"]  # fmt: skip
    began = time.time()
    process = start(f"--config={config_file}", *flags, "--config.train.num_steps=1000000")
    try:
        until(lambda: (workdir / "status.json").exists())
        deadline = time.monotonic() + 120
        while status_of(workdir)["goodput"]["reached_step"] <= (status_of(workdir).get("saved_step") or 10**9) + 20:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)  # it writes the file every ten seconds
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    killed, left = time.time(), status_of(workdir)
    before, saved = left["goodput"], left["saved_step"]
    assert left["state"] == "training"
    assert before["reached_step"] > saved + 20
    _, err = run(*flags, f"--config.train.num_steps={before['reached_step'] + 100}")
    after = status_of(workdir)["goodput"]
    told = err[err.index("goodput") :]
    assert f"goodput {after['goodput']:.1%}" in told
    assert "steps done twice" in told
    assert "2 starts" in told
    spent = {kind: after["seconds"][kind] - before["seconds"][kind] for kind in KINDS}
    # the newest good checkpoint may be newer than the file knew
    assert 0 < spent[REPEATED] < spent[REPEATED] + spent[STEPS]
    assert before["seconds"][REPEATED] == before["seconds"][WAITING] == 0
    assert killed - before["until"] < after["seconds"][WAITING]
    assert all(seconds >= 0 for seconds in spent.values()), spent
    assert spent[COMPILE] > 0
    assert spent[RESTORE] > 0
    wall = after["until"] - after["first_start"]
    assert sum(after["seconds"].values()) == pytest.approx(wall, abs=0.5)
    assert 0 < after["first_start"] - began < 30  # what Python takes to begin, on a busy machine
    assert after["goodput"] == pytest.approx(after["seconds"][STEPS] / wall, abs=0.01)
