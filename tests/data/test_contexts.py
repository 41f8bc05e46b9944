"""Contexts: ids that a slow count of tokens gives, and a model that does not see what is before a cut."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import small_config
from tests.data.made_streams import made_streams
from tests.data.test_streams import corpora, corpus
from tests.nn.test_model import TOTAL, run
from tvq_pod.data.run_streams import streams_of
from tvq_pod.data.schedule import LISTED, DataSchedule, Phase
from tvq_pod.data.streams import BatchSource, read_row


@st.composite
def sessions(draw):
    """Starts of a run: (first step, last step, B, T, {step: length} of the context schedule, updates skipped)."""
    found, step, sizes = [], 0, (2, 3)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.integers(0, 3)) == 0:
            sizes = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
        first_steps = [0, *sorted(draw(st.sets(st.integers(1, 20), max_size=3)))]
        stages = {first: draw(st.integers(0, 4)) * sizes[1] for first in first_steps}
        last = step + draw(st.integers(1, 9))
        found.append((step, last, *sizes, stages, draw(st.integers(0, 2))))
        step = last
    return found


def as_text(stages):
    return ",".join(f"{step}:{length}" for step, length in stages.items())


def contexts_by_token(runs):
    """The slow, obvious way: for every step the number of the context that each of its tokens belongs to."""
    numbers, context, n_tokens, limit = {}, 0, 0, None
    for (first, last, *sizes, stages, _), before in zip(runs, [None, *runs], strict=False):
        for step in range(first, last):
            limit_before, limit = limit, stages[max(begin for begin in stages if begin <= step)]
            if step == first and (before is None or list(before[2:4]) != sizes):
                context, n_tokens = 0, 0  # streams with empty states
            elif step in stages or limit != limit_before:
                context, n_tokens = context + 1, 0
            numbers[step] = []
            for _ in range(sizes[1]):
                if limit and n_tokens == limit:
                    context, n_tokens = context + 1, 0
                numbers[step].append(context)
                n_tokens += 1
    return numbers


@pytest.mark.slow(5)
@settings(max_examples=150, deadline=None)
@given(lengths=corpora, runs=sessions())
def test_ids_count_documents_and_contexts_and_nothing_else_changes(lengths, runs):
    split = corpus(lengths)
    if sum(lengths) < 3:
        return
    expected, schedule, rows = contexts_by_token(runs), None, {}
    for first, last, batch_size, update_len, stages, n_skipped in runs:
        if schedule is None:
            schedule = DataSchedule.begin(batch_size, update_len)
        elif (schedule.now.batch_size, schedule.now.update_len) != (batch_size, update_len):
            schedule, rows = schedule.changed(first, batch_size, update_len), {}
        if n_skipped:
            schedule = schedule.skipping(schedule.now.update(first), n_skipped)
        schedule = DataSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
        schedule = schedule.with_contexts(first, as_text(stages))
        streams = streams_of(schedule, split, seed=0)
        sizes = range(batch_size), update_len, first, last
        source = BatchSource(split.tokens, streams, *sizes, update_of=schedule.now.update, cuts_of=schedule.now.cuts)
        uncut = BatchSource(split.tokens, streams, *sizes, update_of=schedule.now.update)
        for step, row in itertools.product(range(first, last), range(batch_size)):
            found, plain = (
                {name: array[row] for name, array in each[step - first].items()} for each in (source, uncut)
            )
            np.testing.assert_array_equal(found["doc_ids"], plain["doc_ids"] + expected[step])
            for name in ("inputs", "targets", "loss_mask"):
                np.testing.assert_array_equal(found[name], plain[name])
            limit = stages[max(begin for begin in stages if begin <= step)]
            tokens = zip(found["doc_ids"], plain["doc_ids"], expected[step], [limit] * update_len, strict=True)
            rows.setdefault(row, []).extend(tokens)
        for tokens in rows.values():
            ids = [token[0] for token in tokens]
            assert ids == sorted(ids)
            assert len(set(ids)) == len({token[:3] for token in tokens}) == len({token[1:3] for token in tokens})
            assert all(ids.count(token[0]) <= token[3] for token in tokens if token[3])


def test_a_schedule_of_an_older_version_has_no_contexts():
    old = [dict(first_step=0, batch_size=2, update_len=4, skips=[[1, 1]])]
    schedule = DataSchedule.from_json(old)
    assert schedule == DataSchedule((Phase(0, 2, 4, order=LISTED),)).skipping(1, 1)
    assert schedule.with_contexts(7, "") == schedule
    assert {schedule.now.cuts(step) for step in range(50)} == {0}


def test_an_id_that_int32_does_not_hold_is_refused():
    split = corpus([9])
    most = np.iinfo(np.int32).max
    assert set(read_row(split.tokens, made_streams(split, 1, 0), 0, 0, 9, most)["doc_ids"]) == {most}
    with pytest.raises(OverflowError):
        read_row(split.tokens, made_streams(split, 1, 0), 0, 0, 10, most)


@pytest.mark.slow(1)
def test_a_token_after_a_cut_does_not_see_those_before_it():
    """In one document, read by updates of 4 in contexts of 4, 4, 8 and 8 tokens."""
    config, split, update_len = small_config(pe_abs=True, mem_len=3), corpus([3 * TOTAL]), 4
    phase = DataSchedule.begin(1, update_len).with_contexts(0, "0:4,2:8").now
    streams = made_streams(split, 1, 0)
    source = BatchSource(split.tokens, streams, [0], update_len, 0, TOTAL // update_len, cuts_of=phase.cuts)
    updates = [source[step] for step in range(len(source))]
    inputs, ids = (np.concatenate([update[name] for update in updates], axis=1) for name in ("inputs", "doc_ids"))
    inputs %= 11
    logits = run(config, inputs, ids, update_len)
    for begin, end in ((0, 4), (4, 8), (8, 16), (16, 24)):
        alone = np.zeros_like(inputs)
        alone[:, : end - begin] = inputs[:, begin:end]
        expected = run(config, alone, np.zeros_like(ids), update_len)[:, : end - begin]
        np.testing.assert_allclose(logits[:, begin:end], expected, atol=1e-4)
    uncut = run(config, inputs, np.zeros_like(ids), update_len)
    differs = np.abs(uncut - logits).max(axis=(0, 2)) > 1e-3
    assert differs[4:].any()
    assert not differs[:4].any()
