"""A schedule: what each step has read, through changes of the batch and stretches that were skipped."""

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made_streams import made_streams
from tests.data.test_streams import corpus, read_stream
from tvq_pod.data.groups import DocumentStarts
from tvq_pod.data.run_streams import streams_of
from tvq_pod.data.schedule import GROUPED, LISTED, DataSchedule
from tvq_pod.data.store import Split
from tvq_pod.data.streams import read_row


@settings(max_examples=60, deadline=None)
@given(skips=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), max_size=4))
def test_steps_go_through_updates_in_order_and_leave_out_what_is_skipped(skips):
    """Each stretch is where the run was when it skipped it: it is counted in the streams, not in steps."""
    schedule = DataSchedule.begin(4, 8)
    left = list(range(60))  # updates that are still to be read, by step
    for step, count in skips:
        schedule = schedule.skipping(left[step], left[step + count - 1] + 1 - left[step])
        gone = set(range(left[step], left[step + count - 1] + 1))
        left = [update for update in left if update not in gone]
    assert [schedule.now.update(step) for step in range(20)] == left[:20]


def test_a_stretch_is_skipped_once_however_often_it_is_said():
    schedule = DataSchedule.begin(4, 8).skipping(10, 3)
    assert schedule.skipping(10, 3) == schedule
    assert DataSchedule.from_json(schedule.to_json()) == schedule


def plain(starts) -> Split:
    """Documents whose tokens say where they are."""
    tokens = tensorstore.array(np.arange(starts[-1], dtype=np.uint32))
    return Split(tokens, DocumentStarts.of(starts, 2), np.diff(starts))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=2, max_size=8),
    batches=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    updates=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    update_len=st.integers(1, 5),
    seed=st.integers(0, 3),
    version=st.sampled_from([LISTED, GROUPED]),
)
def test_a_change_of_the_batch_reads_on_where_the_streams_were(lengths, batches, updates, update_len, seed, version):
    """Nothing is read twice in an epoch, and nothing left out but a token a row and epoch."""
    starts, n_tokens = np.concatenate([[0], np.cumsum(lengths)]), sum(lengths)
    split = plain(starts)
    if n_tokens < max(batches):
        return
    streams, reads = made_streams(split, batches[0], seed, version), []
    for batch_size, n, following in zip(batches, updates, batches[1:], strict=False):
        if n:
            rows = [read_stream(split, streams, row, n * update_len, update_len) for row in range(batch_size)]
            reads += [place for row in rows for place in row["targets"]]
        streams = streams.recut(n * update_len, following)
    # to the end of the epoch that the last streams are in, and of one more, in one row's worth of tokens at a time
    last = batches[len(updates)] if len(batches) > len(updates) else batches[-1]
    rest = 0 if streams._rest is None else streams._rest.n_tokens
    for row in range(last):
        length = streams._length(0, row) if rest else 0
        if length:
            part = read_row(split.tokens, streams, row, 0, length)
            reads += list(part["targets"])
            assert part["doc_ids"][0] == 0
    counts = np.bincount(reads, minlength=n_tokens)
    n_epochs = streams._first_epoch
    assert counts.max() <= n_epochs  # nothing twice in an epoch
    lost = n_epochs * n_tokens - counts.sum()
    assert 0 <= lost <= sum(batches) * (n_epochs + 1)


def test_a_row_that_is_a_token_behind_loses_that_token_and_no_other():
    """Of 9 tokens, two rows have 4 and 5: after 4, one is in the next epoch already."""
    split = plain(np.array([0, 3, 6, 9]))
    streams = made_streams(split, 2).recut(4, 1)
    assert sorted(read_row(split.tokens, streams, 0, 0, 9)["targets"]) == list(range(9))


def test_streams_of_a_data_schedule_are_those_of_its_changes():
    split = corpus([9, 30, 4, 17, 22])
    schedule = DataSchedule.begin(2, 5).changed(3, 4, 2).changed(5, 1, 6)
    streams = streams_of(schedule, split, seed=1)
    expected = made_streams(split, 2, 1).recut(15, 4).recut(4, 1)
    for name, array in read_row(split.tokens, streams, 0, 0, 50).items():
        np.testing.assert_array_equal(array, read_row(split.tokens, expected, 0, 0, 50)[name])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_left_is_too_little_for_the_rows_and_the_next_epoch_begins(batch_size):
    split = corpus([8, 8])
    streams = made_streams(split, 1, 0).recut(15, batch_size)
    first = read_row(split.tokens, streams, 0, 0, 1)
    left = made_streams(split, 1, 0)
    if batch_size == 1:
        np.testing.assert_array_equal(first["targets"], read_row(split.tokens, left, 0, 15, 16)["targets"])
    else:
        assert streams._rest is None
        assert streams._first_epoch == 1
