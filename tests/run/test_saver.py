"""When a run saves, with no training: checkpoints and votes are made up, and steps are numbers."""

import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvq_pod.config.settings import CheckpointSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import Preempted, UserError
from tvq_pod.run import saver as saver_module
from tvq_pod.run.saver import Saver

GOOD, BAD = dict(n_bad=0), dict(n_bad=1)
SCHEDULE = DataSchedule.begin(8, 16)


class MadeUp:
    """Stands for Checkpoints: a save is on disk at once, unless the disk is full."""

    path = types.SimpleNamespace(parent="RUN")

    def __init__(self):
        self.saved, self.is_full, self.failing, self.busy, self.error = [], False, False, False, ""

    def save(self, state, step, record, schedule, retain_all=False):
        assert (record, schedule) == ({"a": "b"}, SCHEDULE)
        self.failing, self.error = self.is_full, "no room" if self.is_full else ""
        if not self.is_full:
            self.saved.append((state, step, retain_all))

    def wait(self):
        return not self.error

    wait_for_all = wait


class Alone:
    """Votes of a job of one process, or with `others` who cast the same votes as is said of them."""

    def __init__(self):
        self.others = dict(save_failed=False, save_busy=False)

    def cast(self, **votes):
        self.own = votes

    def result(self):
        return {name: self.own[name] or self.others[name] for name in self.own}


def made(every_steps=4):
    checkpoints, votes = MadeUp(), Alone()
    saver = Saver(checkpoints, votes, CheckpointSettings(every_steps=every_steps), {"a": "b"})
    saver.begin(SCHEDULE)
    return saver, checkpoints, votes


def run(saver, checkpoints, steps):
    """steps: (step, metrics, whether a signal asks, whether the disk is full) in order. Returns the steps saved."""
    for step, metrics, is_asked, is_full in steps:
        checkpoints.is_full = is_full
        saver.vote()
        saver.hear()
        if saver.is_due(step, metrics, is_asked):
            saver.save(f"state {step}", step)
        if not is_full:
            checkpoints.failing = False  # the time until the next try is over
    return [step for _, step, _ in checkpoints.saved]


@pytest.mark.parametrize(("every", "expected"), [(4, [4, 8, 12]), (5, [5, 10]), (0, [])])
def test_saves_come_every_so_many_steps(every, expected):
    saver, checkpoints, _ = made(every)
    assert run(saver, checkpoints, [(step, GOOD, False, False) for step in range(1, 13)]) == expected
    assert checkpoints.saved == [(f"state {step}", step, False) for step in expected]


def test_a_signal_asks_for_one_save():
    saver, checkpoints, _ = made(0)
    assert run(saver, checkpoints, [(step, GOOD, step == 3, False) for step in range(1, 8)]) == [3]


def test_what_is_due_between_bad_steps_is_saved_after_them():
    saver, checkpoints, _ = made(4)
    steps = [(step, BAD if step in (4, 5, 8) else GOOD, False, False) for step in range(1, 10)]
    assert run(saver, checkpoints, steps) == [6, 9]


def test_a_save_that_fails_is_told_once_and_tried_again_when_there_is_room(capfd):
    saver, checkpoints, _ = made(4)
    steps = [(step, GOOD, False, 4 <= step <= 6) for step in range(1, 10)]
    assert run(saver, checkpoints, steps) == [8]  # at 7 the disk has room, and at 8 all processes know
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("WARNING: a checkpoint could not be written (no room)")


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=30), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_all_processes_save_at_the_same_steps(happens, every):
    """Of two processes, saves fail on the first only: the second hears of it by the votes."""
    (first, disk, first_votes), (second, _, second_votes) = made(every), made(every)
    for step, (is_full, is_bad, is_asked) in enumerate(happens, 1):
        disk.is_full, metrics = is_full, BAD if is_bad else GOOD
        for saver in (first, second):
            saver.vote()
        second_votes.others, first_votes.others = first_votes.own, second_votes.own
        for saver in (first, second):
            saver.hear()
        due = [saver.is_due(step, metrics, is_asked) for saver in (first, second)]
        assert due[0] == due[1], step
        if due[0]:
            first.save("state", step)
            second.save("state", step)
        disk.failing = disk.failing and is_full


def test_who_is_asked_to_end_saves_and_keeps_older_steps():
    saver, checkpoints, _ = made()
    with pytest.raises(Preempted, match="saved step 7; give"):
        saver.save_and_leave("state", 7)
    assert checkpoints.saved == [("state", 7, True)]
    checkpoints.is_full = True
    with pytest.raises(UserError, match=r"--workdir=RUN: asked to end, and step 8 could not be saved \(no room\)"):
        saver.save_and_leave("state", 8)


@pytest.mark.parametrize("is_bad", [False, True])
def test_the_last_step_is_tried_until_it_is_on_disk(monkeypatch, capfd, is_bad):
    saver, checkpoints, _ = made()
    monkeypatch.setattr(saver_module, "RETRY_SECONDS", 0.0)
    checkpoints.is_full, tries = True, []

    def wait_for_all():
        tries.append(checkpoints.error)
        checkpoints.is_full = len(tries) < 3
        return not checkpoints.error

    checkpoints.wait_for_all = wait_for_all
    saver.save_last("state", 12, is_bad)
    assert checkpoints.saved == [("state", 12, is_bad)]
    assert tries == ["no room"] * 3 + [""]
    assert len(capfd.readouterr().err.splitlines()) == 3
    checkpoints.is_full, checkpoints.wait_for_all = True, lambda: False
    with pytest.raises(UserError, match=r"the last checkpoint can't be written \(no room\)"):
        saver.save_last("state", 13, is_bad)


def test_what_is_owed_is_forgotten_when_the_run_goes_back():
    saver, checkpoints, _ = made(4)
    assert run(saver, checkpoints, [(4, BAD, False, False)]) == []
    saver.begin(SCHEDULE)
    assert run(saver, checkpoints, [(3, GOOD, False, False), (4, GOOD, False, False)]) == [4]


def test_nobody_tries_again_while_the_save_that_failed_is_still_being_written_elsewhere():
    saver, checkpoints, votes = made(4)
    votes.others = dict(save_failed=True, save_busy=True)
    assert run(saver, checkpoints, [(4, GOOD, False, False)]) == []
    votes.others = dict(save_failed=False, save_busy=True)  # its time until the next try is over
    assert run(saver, checkpoints, [(5, GOOD, False, False)]) == []
    votes.others = dict(save_failed=False, save_busy=False)
    assert run(saver, checkpoints, [(6, GOOD, False, False)]) == [6]


def test_a_save_that_was_asked_for_in_passing_does_not_stand_for_one_that_is_due():
    """Between bad steps, a signal in an evaluation; the save that is due comes after them."""
    saver, checkpoints, _ = made(4)
    assert run(saver, checkpoints, [(4, BAD, False, False)]) == []
    saver.save("state 4", 4, retain_all=True)
    assert run(saver, checkpoints, [(5, GOOD, False, False)]) == [4, 5]
