"""Streams: every token once an epoch, ids that count documents, and batches that depend on nothing but their step."""

import itertools

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made_streams import made_streams
from tvq_pod.config.settings import MeshSettings
from tvq_pod.data.groups import DocumentStarts
from tvq_pod.data.loader import Feed
from tvq_pod.data.schedule import GROUPED, LISTED, Phase
from tvq_pod.data.store import Split
from tvq_pod.data.streams import BatchSource, PackedDocuments, read_row
from tvq_pod.data.vocab import END_OF_DOC, PAD
from tvq_pod.errors import UserError
from tvq_pod.parallel.mesh import make_mesh


def corpus(lengths):
    """Documents of the given lengths (end-of-document included) whose tokens are all different, but for the 1 at the
    end of each. Token at place i is 10 + i."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(starts[-1], dtype=np.uint32) + 10
    tokens[starts[1:] - 1] = END_OF_DOC
    return Split(tensorstore.array(tokens), DocumentStarts.of(starts, 3), np.asarray(lengths, np.int64) - 1)


def place_of(split, row):
    """Which corpus token each target of a row is: its value, or for an end-of-document what its input says."""
    ends = {int(split.tokens[end - 2].read().result()) if length > 1 else None: end - 1
            for end, length in zip(split.starts[1:], split.lengths, strict=True)}  # fmt: skip
    return [
        int(t) - 10 if t != END_OF_DOC else ends[int(i)] for t, i in zip(row["targets"], row["inputs"], strict=True)
    ]


def read_stream(split, streams, row, n_tokens, update_len):
    """The first n_tokens or a little more of a row's stream."""
    steps = [
        read_row(split.tokens, streams, row, step * update_len, (step + 1) * update_len)
        for step in range(-(-n_tokens // update_len))
    ]
    return {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}


corpora = st.lists(st.integers(2, 12), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    lengths=corpora,
    batch_size=st.integers(1, 4),
    update_len=st.integers(1, 9),
    seed=st.integers(0, 3),
    version=st.sampled_from([LISTED, GROUPED]),
)
def test_an_epoch_reads_every_token_once_and_ids_count_documents(lengths, batch_size, update_len, seed, version):
    split = corpus(lengths)
    n_tokens, n_epochs = sum(lengths), 3
    if n_tokens < batch_size:
        return
    streams = made_streams(split, batch_size, seed, version)
    seen = [[] for _ in range(n_epochs)]
    for row in range(batch_size):
        length = (row + 1) * n_tokens // batch_size - row * n_tokens // batch_size
        stream = read_stream(split, streams, row, n_epochs * length, update_len)
        targets, inputs, ids = stream["targets"], stream["inputs"], stream["doc_ids"]
        assert (stream["loss_mask"] == 1).all()
        assert ids[0] == 0
        assert set(np.diff(ids)) <= {0, 1}
        begins = np.concatenate([[True], np.diff(ids) == 1])
        assert (inputs[begins] == END_OF_DOC).all()
        # within a document: the input is the token before, and tokens follow each other in the corpus
        (within,) = np.nonzero(~begins)
        assert (inputs[within] == targets[within - 1]).all()
        regular = within[targets[within] != END_OF_DOC]
        assert (targets[regular] == targets[regular - 1] + 1).all()
        # a document's end is followed by a new one
        (ends,) = np.nonzero(targets[:-1] == END_OF_DOC)
        assert begins[ends + 1].all()
        for epoch in range(n_epochs):
            seen[epoch].append(targets[epoch * length : (epoch + 1) * length])
    everything = np.sort(split.tokens.read().result())
    for epoch in range(n_epochs):
        np.testing.assert_array_equal(np.sort(np.concatenate(seen[epoch])), everything)


@pytest.mark.parametrize("version", [LISTED, GROUPED])
def test_epochs_and_seeds_have_different_orders(version):
    split = corpus([5] * 40)
    orders = []
    for seed in (0, 1):
        stream = read_stream(split, made_streams(split, 1, seed, version), 0, 400, 50)
        orders += [tuple(stream["targets"][:200]), tuple(stream["targets"][200:400])]
    assert len(set(orders)) == 4


@pytest.mark.slow(2)
@pytest.mark.parametrize("cuts_of", [None, Phase(0, 8, 5, contexts=((0, "0:5,3:10,6:0"), (8, "0:15"))).cuts])
def test_batches_are_the_same_for_any_number_of_hosts_and_any_start(cuts_of):
    split = corpus([7, 3, 20, 2, 11, 9])
    batch_size, update_len, n_steps = 8, 5, 12
    mesh = make_mesh(MeshSettings())

    def batches(process_count, first_step):
        streams = [made_streams(split, batch_size, seed=3) for _ in range(process_count)]  # as processes have
        hosts = [
            Feed(
                split, streams[process], mesh, batch_size, update_len, threads=2, ahead=3, cuts_of=cuts_of
            ).host_batches(
                range(process * batch_size // process_count, (process + 1) * batch_size // process_count),
                first_step,
                n_steps,
            )
            for process in range(process_count)
        ]
        return [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*hosts, strict=True)
        ]

    expected = batches(1, 0)
    assert len(expected) == n_steps
    if cuts_of:
        uncut = read_stream(split, made_streams(split, batch_size, seed=3), 5, n_steps * update_len, update_len)
        cuts = np.repeat([0, 1, 2, 3, 3, 4, 5, 5, 6, 6, 6, 7], update_len)
        ids = np.concatenate([batch["doc_ids"][5] for batch in expected])
        np.testing.assert_array_equal(ids - uncut["doc_ids"], cuts)
    for process_count, first_step in itertools.product((1, 2, 4), (0, 7)):
        for batch, same in zip(batches(process_count, first_step), expected[first_step:], strict=True):
            for name in same:
                assert batch[name].shape == (batch_size, update_len)
                np.testing.assert_array_equal(batch[name], same[name])


@pytest.mark.slow(1)
def test_a_step_far_into_training_is_what_reading_up_to_it_gives():
    split = corpus([7, 3, 20, 2])
    fresh = made_streams(split, 2, seed=1)
    late = read_row(split.tokens, fresh, 1, 6000, 6006)
    replayed = made_streams(split, 2, seed=1)
    for step in range(1001):
        row = read_row(split.tokens, replayed, 1, 6 * step, 6 * step + 6)
    for name in row:
        np.testing.assert_array_equal(row[name], late[name])


def test_fewer_tokens_than_rows_is_an_error():
    with pytest.raises(UserError, match=r"config.train.batch_size=9: must be at most 8, the number of tokens"):
        made_streams(corpus([4, 4]), 9)


@settings(max_examples=60, deadline=None)
@given(lengths=corpora, n_rows=st.integers(1, 5), update_len=st.integers(1, 9))
def test_packing_keeps_each_document_whole_on_one_row(lengths, n_rows, update_len):
    split = corpus(lengths)
    plan = PackedDocuments(split.starts, n_rows)
    n_steps = -(-plan.row_len // update_len)
    found = []
    for row in range(n_rows):
        steps = [
            read_row(split.tokens, plan, row, step * update_len, (step + 1) * update_len) for step in range(n_steps)
        ]
        stream = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
        real = stream["loss_mask"] == 1
        n_real = int(real.sum())
        assert real[:n_real].all()  # padding only at the end
        assert (stream["inputs"][~real] == PAD).all()
        ids = stream["doc_ids"]
        assert (np.diff(ids.astype(np.int64)) >= 0).all()
        if n_real < len(ids):
            assert not set(ids[real]) & set(ids[~real])
        places = place_of(split, {name: array[:n_real] for name, array in stream.items()})
        for doc_id in range(ids[real].max() + 1 if n_real else 0):
            (at,) = np.nonzero(ids[:n_real] == doc_id)
            document = int(np.searchsorted(split.starts, places[at[0]], side="right")) - 1
            expected = list(range(split.starts[document], split.starts[document + 1]))
            assert [places[i] for i in at] == expected
            assert stream["inputs"][at[0]] == END_OF_DOC
            found.append(document)
    assert sorted(found) == list(range(len(lengths)))
    assert plan.row_len <= sum(lengths) / n_rows + max(lengths)


def test_max_tokens_takes_whole_documents_until_there_are_enough():
    starts = corpus([5] * 10).starts
    assert len(PackedDocuments(starts, 2, max_tokens=0).documents) == 10
    assert len(PackedDocuments(starts, 2, max_tokens=11).documents) == 3
    assert len(PackedDocuments(starts, 2, max_tokens=1000).documents) == 10
    np.testing.assert_array_equal(
        PackedDocuments(starts, 2, max_tokens=11).documents, PackedDocuments(starts, 3, max_tokens=11).documents
    )


def test_no_row_of_a_batch_waits_for_another():
    """All reads of a batch have begun before one of them is waited for; on two ranges of an update, too."""
    split, begun, waited = corpus([5, 9, 7, 12, 6]), [], []

    class Range:
        def __init__(self, places):
            self.places = places

        def read(self):
            begun.append(self)
            return self

        def result(self):
            waited.append(len(begun))
            return split.tokens[self.places].read().result()

    class Tokens:
        def __getitem__(self, places):
            return Range(places)

    streams = made_streams(split, 3)
    source = BatchSource(Tokens(), streams, [0, 2], 8, 0, 2, [range(2), range(4, 8)])
    for step in range(2):
        begun.clear()
        waited.clear()
        batch = source[step]
        assert set(waited) == {len(begun)}
        assert len(begun) >= 4
        for place, row in enumerate((0, 2)):
            whole = read_row(split.tokens, streams, row, 8 * step, 8 * step + 8)
            for name, array in batch.items():
                np.testing.assert_array_equal(array[place], np.r_[whole[name][:2], whole[name][4:8]])
