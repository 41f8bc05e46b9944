"""Where a run goes on, with no training: checkpoints are made up, skipped stretches are in their real file."""

import json

import pytest
from etils import epath

from tvq_pod.config.identity import FINGERPRINT
from tvq_pod.config.settings import BadStepsSettings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.run.rollback import BadStretch, Rollback, check_good
from tvq_pod.run.skipped import Skipped


class MadeUp:
    """Stands for Checkpoints: which steps there are, each with its data schedule."""

    def __init__(self, schedules):
        self.schedules, self.asked = dict(schedules), []

    def schedule(self, step):
        return self.schedules[step]

    def wait(self):
        self.asked.append("wait")

    def undo(self, after):
        self.asked.append(f"undo after {after}")
        self.schedules = {step: schedule for step, schedule in self.schedules.items() if step <= after}

    def newest_good(self):
        return max(self.schedules, default=None)

    def check(self, step, record):
        self.asked.append(f"check {step}")

    def check_streams(self, step, train):
        self.asked.append(f"check streams {step}")


def made(workdir, schedules, max_rollbacks=10, batch_size=8, on_batch_change="refuse", contexts=""):
    train = TrainSettings(
        batch_size=batch_size, update_len=16, on_batch_change=on_batch_change, context_schedule=contexts
    )
    checkpoints = MadeUp(schedules)
    settings = BadStepsSettings(rollback_after=3, max_rollbacks=max_rollbacks)
    return Rollback(checkpoints, Skipped(epath.Path(workdir)), train, settings), checkpoints


def updates(schedule, first_step, n):
    """The updates that steps first_step .. first_step + n - 1 read."""
    return [schedule.now.update(step) for step in range(first_step, first_step + n)]


BEGUN = DataSchedule.begin(8, 16)


def test_a_step_is_one_bad_step_too_many():
    settings = BadStepsSettings(rollback_after=3)
    check_good(dict(n_bad=2), 9, settings)
    with pytest.raises(BadStretch) as raised:
        check_good(dict(n_bad=3), 10, settings)
    assert (raised.value.last_step, raised.value.n_bad) == (10, 3)


def test_data_of_bad_steps_is_skipped_and_nothing_else(tmp_path):
    """Steps 8 to 10 were bad: they read updates 7 to 9."""
    rollback, checkpoints = made(tmp_path, {4: BEGUN, 8: BEGUN})
    assert rollback.go_back(BadStretch(10, 3), BEGUN) == 4
    assert checkpoints.asked == ["wait", "undo after 7"]
    schedule = rollback.schedule_at(4)
    assert updates(schedule, 4, 6) == [4, 5, 6, 10, 11, 12]
    again, _ = made(tmp_path, {4: BEGUN})  # another start finds it in the file
    assert again.schedule_at(4) == schedule
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert {name: json.loads(line)[name] for name in ("update", "count", "back_to", "bad_steps")} == dict(
        update=7, count=3, back_to=4, bad_steps=[8, 10]
    )


def test_stretches_that_follow_each_other_add_up(tmp_path):
    """Going on from step 4, steps 8 to 10 read updates 10 to 12, and are bad, too."""
    rollback, _ = made(tmp_path, {4: BEGUN})
    rollback.go_back(BadStretch(10, 3), rollback.schedule_at(4))
    rollback.go_back(BadStretch(10, 3), rollback.schedule_at(4))
    assert updates(rollback.schedule_at(4), 4, 6) == [4, 5, 6, 13, 14, 15]


def test_without_a_checkpoint_the_run_goes_back_to_the_seed(tmp_path):
    rollback, _ = made(tmp_path, {})
    assert rollback.go_back(BadStretch(3, 3), rollback.schedule_at(None)) is None
    assert updates(rollback.schedule_at(None), 0, 3) == [3, 4, 5]


def test_a_run_goes_back_only_so_often(tmp_path):
    rollback, checkpoints = made(tmp_path, {4: BEGUN}, max_rollbacks=1)
    rollback.go_back(BadStretch(10, 3), BEGUN)
    checkpoints.asked.clear()
    with pytest.raises(UserError, match=r"^config.bad_steps.max_rollbacks=1: steps 8 to 10 were bad"):
        rollback.go_back(BadStretch(10, 3), BEGUN)
    assert checkpoints.asked == []  # nothing is set aside


def test_other_streams_begin_where_they_are_changed(tmp_path):
    """What was skipped of the streams before is not skipped of those that follow."""
    rollback, _ = made(tmp_path, {4: BEGUN})
    rollback.go_back(BadStretch(10, 3), BEGUN)
    wider, checkpoints = made(tmp_path, {6: rollback.schedule_at(4)}, batch_size=16, on_batch_change="restart_streams")
    schedule = wider.schedule_at(6)
    assert [phase.batch_size for phase in schedule.phases] == [8, 16]
    assert updates(schedule, 6, 3) == [0, 1, 2]
    wider.check_belongs(6, {})
    assert checkpoints.asked == ["check 6"]


def test_other_streams_are_refused_unless_asked_for(tmp_path):
    rollback, checkpoints = made(tmp_path, {4: BEGUN})
    rollback.check_belongs(4, {})
    assert checkpoints.asked == ["check 4", "check streams 4"]


def cuts(schedule, n):
    """How many contexts have ended before each of the first n steps."""
    return [schedule.now.cuts(step) for step in range(n)]


def test_another_context_schedule_holds_from_the_checkpoint_on_in_the_same_streams(tmp_path):
    """It is not asked for again, and a start with the same one changes nothing."""
    rollback, _ = made(tmp_path, {3: BEGUN}, contexts="0:32,5:0")
    schedule = rollback.schedule_at(3)
    assert (len(schedule.phases), updates(schedule, 0, 8)) == (1, list(range(8)))
    assert cuts(schedule, 8) == [0, 0, 0, 1, 1, 2, 2, 2]
    rollback, _ = made(tmp_path, {4: schedule}, contexts="0:32,5:0")
    assert rollback.schedule_at(4) == schedule
    longer, _ = made(tmp_path, {4: schedule}, contexts="0:32,7:16")  # it was at 32 and stays there until step 7
    assert cuts(longer.schedule_at(4), 9) == [0, 0, 0, 1, 1, 2, 2, 3, 4]
    staged, _ = made(tmp_path, {4: schedule}, contexts="0:64,4:32,6:32")  # of the same length, but stages of their own
    assert cuts(staged.schedule_at(4), 9) == [0, 0, 0, 1, 2, 2, 3, 3, 4]
    off, _ = made(tmp_path, {4: schedule})
    assert cuts(off.schedule_at(4), 9) == [0, 0, 0, 1, 2, 2, 2, 2, 2]


def test_contexts_are_cut_at_the_same_steps_after_going_back(tmp_path):
    """Whatever is skipped; and a run that goes back to before it knew the setting has it from there on."""
    schedule = BEGUN.with_contexts(0, "0:48")
    rollback, _ = made(tmp_path, {4: schedule}, contexts="0:48")
    rollback.go_back(BadStretch(10, 3), schedule)
    assert cuts(rollback.schedule_at(4), 9) == cuts(schedule, 9) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    later, _ = made(tmp_path, {4: BEGUN, 8: BEGUN}, contexts="0:48")
    assert later.go_back(BadStretch(10, 3), later.schedule_at(8)) == 4
    assert cuts(later.schedule_at(4), 9) == [0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_contexts_begin_with_other_streams(tmp_path):
    """Whose states are empty and whose documents are counted from 0."""
    begun = BEGUN.with_contexts(0, "0:32")
    wider, _ = made(tmp_path, {3: begun}, batch_size=16, on_batch_change="restart_streams", contexts="0:32")
    assert [wider.schedule_at(3).now.cuts(step) for step in range(3, 8)] == [0, 0, 1, 1, 2]


def test_other_data_begins_other_streams_where_the_run_resumes(tmp_path):
    """Not for data that the checkpoint knows, and again after going back to before it."""
    records = {4: {FINGERPRINT: "a"}, 8: {FINGERPRINT: "b"}}
    changed = BEGUN.changed(4, 8, 16, data="b")
    checkpoints = MadeUp({4: BEGUN, 8: changed})
    checkpoints.record = records.__getitem__
    train = TrainSettings(batch_size=8, update_len=16, on_data_change="restart_streams")
    rollback = Rollback(checkpoints, Skipped(epath.Path(tmp_path)), train, BadStepsSettings(), fingerprint="b")
    assert rollback.schedule_at(8) == changed
    assert rollback.schedule_at(4) == changed
    assert rollback.go_back(BadStretch(6, 2), changed) == 4  # steps 5 and 6 read updates 0 and 1
    assert updates(rollback.schedule_at(4), 4, 2) == [2, 3]
    asked = []
    checkpoints.check = lambda step, record: asked.append(record)
    rollback.check_belongs(8, {FINGERPRINT: "b", "config.seed": "0"})
    assert asked == [{"config.seed": "0"}]


def test_what_was_skipped_of_some_data_is_not_skipped_of_other_data_from_the_same_step(tmp_path):
    """A run goes back to where other data began, and takes that data in a better version."""
    path, begun = epath.Path(tmp_path), DataSchedule.begin(8, 8)
    of_bad, of_good = (begun.changed(5, 8, 8, data=data) for data in ("bad", "good"))
    rollback = Rollback(MadeUp({5: begun}), Skipped(path), TrainSettings(), BadStepsSettings())
    assert rollback.go_back(BadStretch(last_step=8, n_bad=2), of_bad) == 5
    assert Skipped(path).put_into(of_bad) == of_bad.skipping(1, 2)
    assert Skipped(path).put_into(of_good) == of_good
    assert Skipped(path).count() == 1
    line = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert line.pop("data") == "bad"
    (tmp_path / "skipped.jsonl").write_text(json.dumps(line) + "\n")  # of an older version, which did not say
    assert Skipped(path).put_into(of_good) == of_good.skipping(1, 2)
