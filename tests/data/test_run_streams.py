"""The streams of a run whose data or mixture changes: each step reads what was asked for, whatever happened before."""

import collections
import itertools

import numpy as np
import pytest

from tests.common import store_of
from tests.data.made_streams import made_streams
from tests.data.test_streams import corpus
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.order import ListedOrder
from tvq_pod.data.run_streams import EPOCHS_APART, MOST_CHANGES, streams_of
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.streams import TrainStreams, read_row

ROWS, LEN = 3, 10
SCHEDULE = DataSchedule.begin(ROWS, LEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for name in "ab":
        store_of(folder / name, [f"{name * (3 + n % 5)} ".encode() for n in range(60)])
    return folder


def mixture(folder, schedule, weights="1/1"):
    a, b = weights.split("/")
    return Mixture.open(f"{folder}/a={a},{folder}/b={b}", schedule)


def plan_of(split, schedule=SCHEDULE, seed=1):
    return streams_of(schedule, split, seed)


def read(split, plan, update, length=LEN, rows=ROWS):
    """All rows of an update."""
    return [read_row(split.tokens, plan, row, update * length, (update + 1) * length) for row in range(rows)]


def letters(batch):
    """How many tokens of each store are in it."""
    tokens = np.concatenate([row["targets"] for row in batch])
    return collections.Counter(bytes((tokens[tokens >= 3] - 3).astype(np.uint8)).decode().replace(" ", ""))


def test_weights_change_at_their_steps_and_nothing_before_does(folder):
    split = mixture(folder, "4:1/0,9:0/1").split("train")
    plan, alone = plan_of(split), plan_of(mixture(folder, "").split("train"))
    for update in range(4):
        for ours, others in zip(read(split, plan, update), read(split, alone, update), strict=True):
            for name in ours:
                np.testing.assert_array_equal(ours[name], others[name])
    assert {letter for update in range(4) for letter in letters(read(split, plan, update))} == {"a", "b"}
    assert all(set(letters(read(split, plan, update))) == {"a"} for update in range(4, 9))
    assert all(set(letters(read(split, plan, update))) == {"b"} for update in range(9, 14))


def test_weights_are_shares_of_what_is_read_after_the_change(folder):
    split = mixture(folder, "2:1/3").split("train")
    plan, counts = plan_of(split), collections.Counter()
    for update in range(2, 42):
        counts.update(letters(read(split, plan, update)))
    assert counts["a"] / sum(counts.values()) == pytest.approx(0.25, abs=0.05)


def test_documents_begin_anew_and_their_ids_go_on_counting(folder):
    split = mixture(folder, "4:1/0,9:0/1").split("train")
    plan = plan_of(split)
    for row in range(ROWS):
        whole = read_row(split.tokens, plan, row, 0, 14 * LEN)
        ids = whole["doc_ids"]
        assert set(np.diff(ids)) <= {0, 1}
        for update in (4, 9):
            assert ids[update * LEN] == ids[update * LEN - 1] + 1
            assert whole["inputs"][update * LEN] == 1  # end-of-document: the first input of a document
        parts = [read_row(split.tokens, plan, row, begin, begin + 7) for begin in range(0, 14 * LEN, 7)]
        for name, array in whole.items():  # however it is asked for
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts])[: len(array)])


def test_the_fingerprint_knows_the_schedule(folder):
    fingerprints = [mixture(folder, text).fingerprint for text in ("", "4:1/1", "4:2/2", "5:1/1", "4:1/1,6:1/2")]
    assert fingerprints[1] == fingerprints[2]
    assert len(set(fingerprints)) == 4
    assert mixture(folder, "").split("train").stages == ()


def test_a_change_of_the_batch_keeps_the_weights_and_the_steps_of_later_changes(folder):
    split = mixture(folder, "4:1/0,9:0/1").split("train")
    plan = plan_of(split, SCHEDULE.changed(6, 2, 5))
    assert all(set(letters(read(split, plan, update, 5, 2))) == {"a"} for update in range(3))  # steps 6, 7, 8
    assert all(set(letters(read(split, plan, update, 5, 2))) == {"b"} for update in range(3, 6))


def test_data_that_is_skipped_is_what_was_there_before_it_was_skipped(folder):
    """If skipping moved a change of weights in the streams, other updates than the bad ones would be left out."""
    split = mixture(folder, "4:1/0").split("train")
    before, after = plan_of(split), plan_of(split, SCHEDULE.skipping(3, 2))
    for update in range(8):
        assert letters(read(split, before, update)) == letters(read(split, after, update))


def test_a_change_that_skipped_data_brought_on_does_not_come_again_with_another_batch(folder):
    """Updates 2 to 5 are skipped, so the change of step 7 comes at step 3; the batch changes at step 5."""
    split = mixture(folder, "7:1/0,12:0/1").split("train")
    skipping = SCHEDULE.skipping(2, 4)
    changed = plan_of(split, skipping.changed(5, ROWS, LEN))
    assert skipping.now.update(5) == 9  # the change is behind it
    assert {letter for update in range(7) for letter in letters(read(split, changed, update))} == {"a"}
    assert set(letters(read(split, changed, 7))) == {"b"}  # step 12
    alone = TrainStreams(ListedOrder(split.starts, 1, split.stages[0].parts), ROWS, EPOCHS_APART)
    expected = alone.recut(2 * LEN, ROWS)  # of which updates 7 and 8 were read
    for row in range(ROWS):
        found, wanted = (read_row(split.tokens, each, row, 0, 7 * LEN) for each in (changed, expected))
        np.testing.assert_array_equal(found["targets"], wanted["targets"])


def test_other_data_begins_with_an_order_of_its_own_and_reads_nothing_of_before():
    split = corpus([9, 30, 4, 17, 22])
    schedule = SCHEDULE.changed(3, 2, 5).changed(4, 2, 5, data="other").changed(6, 4, 2)
    expected = made_streams(split, 2, 1, first_epoch=EPOCHS_APART * MOST_CHANGES).recut(10, 4)
    for name, array in read_row(split.tokens, streams_of(schedule, split, 1), 0, 0, 30).items():
        np.testing.assert_array_equal(array, read_row(split.tokens, expected, 0, 0, 30)[name])


def test_other_data_begins_with_the_weights_that_its_schedule_has_by_then(folder):
    split = mixture(folder, "4:1/0,9:0/1").split("train")
    for first_step in (3, 4, 6):
        plan = plan_of(split, SCHEDULE.changed(first_step, ROWS, LEN, data="other"))
        for step in range(max(first_step, 4), 12):
            assert set(letters(read(split, plan, step - first_step))) == ({"a"} if step < 9 else {"b"})


def test_data_that_is_read_again_later_comes_in_another_order():
    split = corpus([5] * 40)
    once = SCHEDULE.changed(3, ROWS, LEN, "b")
    schedules = [SCHEDULE, once, once.changed(4, ROWS, LEN, "a")]
    orders = [read_row(split.tokens, streams_of(each, split, 1), 0, 0, 60)["targets"] for each in schedules]
    assert all((one != other).any() for one, other in itertools.combinations(orders, 2))


def test_a_schedule_with_other_data_is_kept_in_checkpoints_and_older_ones_are_read():
    schedule = SCHEDULE.changed(4, 2, 5, data="other").skipping(2, 1).with_contexts(5, "0:10")
    assert DataSchedule.from_json(schedule.to_json()) == schedule
    older = [{name: value for name, value in phase.items() if name != "data"} for phase in SCHEDULE.to_json()]
    assert DataSchedule.from_json(older) == SCHEDULE
