"""Stretches of large mixtures: shares of every step, each token of a store in its turn, and a function of the place."""

import collections
import itertools
import math

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import store_of
from tests.data.made_streams import made_streams
from tvq_pod.data import run_streams, stretches
from tvq_pod.data.groups import DocumentStarts
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.parted import joined
from tvq_pod.data.schedule import GROUPED, LISTED, STRETCHED, DataSchedule
from tvq_pod.data.store import Part
from tvq_pod.data.streams import read_row
from tvq_pod.data.stretches import StretchedStreams

LEN = 37  # tokens of a stretch here


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH", LEN)
    monkeypatch.setattr(stretches, "BLOCK", 4)
    monkeypatch.setattr(run_streams, "MOST_LISTED", 0)


def documents_of(lengths: list[list[int]]) -> tuple[DocumentStarts, list[range]]:
    """Documents of some stores, in groups of three, as a mixture has them; and each store's tokens."""
    ends = np.cumsum([0, *map(sum, lengths)])
    starts = [DocumentStarts.of(np.concatenate([[0], np.cumsum(each)]), 3) for each in lengths]
    on_disk = [DocumentStarts(tensorstore.array(each.array), each.documents, each.tokens) for each in starts]
    return joined(on_disk), [range(begin, end) for begin, end in itertools.pairwise(ends.tolist())]


def parts_of(lengths: list[list[int]], weights: list[float]) -> list[Part]:
    firsts = itertools.accumulate(map(len, lengths), initial=0)
    return [Part(first, len(each), w) for first, each, w in zip(firsts, lengths, weights, strict=False)]


def streams_of(lengths, weights, batch_size, seed=0) -> StretchedStreams:
    return StretchedStreams(documents_of(lengths)[0], parts_of(lengths, weights), seed, batch_size)


def tokens_of(streams, row, begin, end) -> list[int]:
    return [t for s in streams.segments(row, begin, end) for t in range(s.start, s.start + s.length)]


store = st.lists(st.integers(1, 30), min_size=1, max_size=12)
mixtures = st.lists(store, min_size=1, max_size=3)


def weights_of(data, lengths) -> list[float]:
    weights = [data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.5])) for _ in lengths]
    return weights if any(weights) else [1.0] * len(lengths)


@pytest.mark.slow(5)
@settings(max_examples=60, deadline=None)
@given(lengths=mixtures, batch_size=st.integers(1, 13), data=st.data())
def test_each_store_has_its_share_of_the_rows_of_every_stretch_and_its_tokens_in_turn(lengths, batch_size, data):
    weights, n = weights_of(data, lengths), 30
    streams, stores = streams_of(lengths, weights, batch_size), documents_of(lengths)[1]
    read, rows_of = collections.Counter(), collections.Counter()
    for index in range(n):
        in_stretch = collections.Counter()
        for row in range(batch_size):
            tokens = tokens_of(streams, row, index * LEN, (index + 1) * LEN)
            (store,) = {place for place, own in enumerate(stores) for t in tokens if t in own}
            assert len(tokens) == LEN
            in_stretch[store] += 1
            read.update(tokens)
        for store, weight in enumerate(weights):
            share = batch_size * weight / sum(weights)
            assert math.floor(share) <= in_stretch[store] <= math.ceil(share)
        rows_of.update(in_stretch)
    for store, own in enumerate(stores):
        assert rows_of[store] == pytest.approx(n * batch_size * weights[store] / sum(weights), abs=3)
        times = [read[t] for t in own]
        assert max(times) - min(times) <= 1


@pytest.mark.slow(1)
@settings(max_examples=60, deadline=None)
@given(lengths=mixtures, batch_size=st.integers(1, 9), row=st.integers(0, 8), data=st.data())
def test_a_row_is_the_same_however_it_is_asked_for_and_its_document_ids_go_up(lengths, batch_size, row, data):
    weights, row, end = weights_of(data, lengths), row % batch_size, 9 * LEN
    whole = [*streams_of(lengths, weights, batch_size).segments(row, 0, end)]
    ids = [(s.doc_id, s.begins) for s in whole for _ in range(s.length)]
    cuts = sorted({0, end, *data.draw(st.lists(st.integers(0, end), max_size=5))})
    again = streams_of(lengths, weights, batch_size)
    order = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    for begin, stop in order:
        found = [*again.segments(row, begin, stop)]
        assert [t for s in found for t in range(s.start, s.start + s.length)] == [
            t for s in whole for t in range(s.start, s.start + s.length)
        ][begin:stop]
        assert [s.doc_id for s in found for _ in range(s.length)] == [doc_id for doc_id, _ in ids[begin:stop]]
    for one, other in itertools.pairwise(whole):
        assert other.begins == (other.doc_id > one.doc_id)
        assert other.doc_id >= one.doc_id
        if not other.begins:
            assert other.start == one.start + one.length
    starts = set(documents_of(lengths)[0].whole.tolist())
    at = 0
    for segment in whole:
        assert segment.begins == (segment.start in starts or at % LEN == 0)
        at += segment.length


def test_rows_are_where_the_equation_says():
    weights, batch_size = [0.5, 0.125, 0.375], 8
    lengths = [[5] * 40, [3] * 10, [7] * 20]
    streams, stores = streams_of(lengths, weights, batch_size), documents_of(lengths)[1]
    bounds, checked = np.cumsum(weights), 0
    for index, row in itertools.product(range(40), range(batch_size)):
        turned = math.floor(batch_size * math.modf(index * math.sqrt(2))[0])
        u = ((row + turned) % batch_size + math.modf(index * (math.sqrt(5) - 1) / 2)[0]) / batch_size
        if min(abs(u - bounds)) < 1e-4 or math.modf(index * math.sqrt(2) * batch_size)[0] > 0.999:
            continue
        (token, *_) = tokens_of(streams, row, index * LEN, index * LEN + 1)
        assert token in stores[int(np.searchsorted(bounds, u, "right"))]
        checked += 1
    assert checked > 300


def test_other_rows_read_on_where_no_stretch_has_begun():
    lengths = [[4, 9, 2, 6] * 30, [8, 3] * 20]
    streams = streams_of(lengths, [2.0, 1.0], 5)
    begun = collections.Counter(t for row in range(5) for t in tokens_of(streams, row, 0, 3 * LEN))
    again = streams.recut(2 * LEN + 1, 3)
    after = collections.Counter(t for row in range(3) for t in tokens_of(again, row, 0, 4 * LEN))
    assert again.recut(0, 5).recut(0, 3) is not again
    for own in documents_of(lengths)[1]:
        times = [(begun + after)[t] for t in own]
        assert max(times) - min(times) <= 1
    third = again.recut(4 * LEN, 2)
    after.update(t for row in range(2) for t in tokens_of(third, row, 0, 2 * LEN))
    for own in documents_of(lengths)[1]:
        times = [(begun + after)[t] for t in own]
        assert max(times) - min(times) <= 1


def test_seeds_epochs_and_stores_have_orders_of_their_own():
    lengths = [[3] * 60, [3] * 60]
    documents, orders = documents_of(lengths)[0], set()
    for seed, epoch, weights in itertools.product((0, 1), (0, 1), ([1.0, 0.0], [0.0, 1.0])):
        streams = StretchedStreams(documents, parts_of(lengths, weights), seed, 1, epoch)
        orders.add(tuple(t % 180 for t in tokens_of(streams, 0, 0, LEN)))
    assert len(orders) == 8


def test_a_place_that_is_far_away_is_found_without_reading_what_is_before_it():
    lengths = [[5, 1, 7] * 400, [2] * 600]
    documents, _ = documents_of(lengths)
    reads = []

    class Counted:
        def __getitem__(self, places):
            reads.append(places)
            return documents.array[places]

    counted = DocumentStarts(Counted(), documents.documents, documents.tokens)
    streams = StretchedStreams(counted, parts_of(lengths, [1.0, 1.0]), 0, 4)
    assert len(tokens_of(streams, 2, 1000 * LEN, 1001 * LEN)) == LEN
    assert len(reads) <= 1 + LEN // 6


# ------------------------------------------------- in runs
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stretches")
    for name in "ab":
        store_of(folder / name, [f"{name * (3 + n % 5)} ".encode() for n in range(60)])
    return folder


def split_of(folder, schedule="", weights=(1, 1)):
    return Mixture.open(f"{folder}/a={weights[0]},{folder}/b={weights[1]}", schedule).split("train")


def letters(split, plan, update, rows=3, length=10) -> set[str]:
    batch = [read_row(split.tokens, plan, row, update * length, (update + 1) * length) for row in range(rows)]
    tokens = np.concatenate([row["targets"] for row in batch])
    return set(bytes((tokens[tokens >= 3] - 3).astype(np.uint8)).decode().replace(" ", ""))


@pytest.mark.parametrize("version", [LISTED, GROUPED])
def test_runs_that_began_before_keep_the_order_of_all_documents(folder, monkeypatch, version):
    split = split_of(folder)
    monkeypatch.setattr(run_streams, "MOST_LISTED", 10**6)
    expected = made_streams(split, 3, version=STRETCHED)  # a small mixture has the order that it always had
    monkeypatch.setattr(run_streams, "MOST_LISTED", 0)
    ours, newest = made_streams(split, 3, version=version), made_streams(split, 3, version=STRETCHED)
    tokens = [[tokens_of(streams, row, 0, 100) for row in range(3)] for streams in (ours, expected, newest)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


def test_a_new_run_reads_stretches_and_its_weights_may_change(folder):
    split = split_of(folder, "4:1/0,9:0/1")
    schedule = DataSchedule.begin(3, 10)
    plan = run_streams.streams_of(schedule, split, 1)
    assert {letter for update in range(4) for letter in letters(split, plan, update)} == {"a", "b"}
    assert all(letters(split, plan, update) == {"a"} for update in range(4, 9))
    assert all(letters(split, plan, update) == {"b"} for update in range(9, 14))
    for row in range(3):
        ids = read_row(split.tokens, plan, row, 0, 140)["doc_ids"]
        assert (np.diff(ids) >= 0).all()
        assert all(ids[update * 10] > ids[update * 10 - 1] for update in (4, 9))
    changed = run_streams.streams_of(schedule.changed(6, 2, 5), split, 1)
    assert all(letters(split, changed, update, 2, 5) == {"a"} for update in range(3))
    assert all(letters(split, changed, update, 2, 5) == {"b"} for update in range(3, 6))
