"""The order of documents: groups in a drawn order, and in each its documents in a drawn order; what is read for it; and
the order of runs that began before there were groups."""

import itertools
import json

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made_streams import made_streams
from tests.data.test_streams import corpus
from tvq_pod.config.settings import DataSettings
from tvq_pod.data import checked, writer
from tvq_pod.data.build import make_store
from tvq_pod.data.document import Document
from tvq_pod.data.groups import DocumentStarts
from tvq_pod.data.order import GroupedOrder, PartsOf
from tvq_pod.data.run_streams import streams_of
from tvq_pod.data.schedule import LISTED, DataSchedule
from tvq_pod.data.store import Split, TokenStore
from tvq_pod.data.vocab import ByteVocab

lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=14)


def documents_of(line, starts) -> list[int]:
    """The documents of a line, which has them whole."""
    found = []
    for piece in line.pieces(0, line.n_tokens):
        document = int(np.searchsorted(starts, piece.start))
        assert piece == (starts[document], starts[document + 1] - starts[document], True, len(found))
        found.append(document)
    return found


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, size=st.integers(1, 5), seed=st.integers(0, 2), epoch=st.integers(0, 3))
def test_a_line_has_group_after_group_and_each_document_once(lengths, size, seed, epoch):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    line = GroupedOrder(DocumentStarts.of(starts, size), seed).epoch(epoch)
    order = documents_of(line, starts)
    assert sorted(order) == list(range(len(lengths)))
    groups = [document // size for document in order]
    assert len([1 for one, next_ in itertools.pairwise(groups) if one != next_]) == len(set(groups)) - 1
    number_of_token = np.repeat(np.arange(len(order)), np.asarray(lengths)[order])
    at = np.arange(line.n_tokens)
    np.testing.assert_array_equal(line.numbers(at), number_of_token)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, size=st.integers(1, 5), data=st.data())
def test_pieces_of_any_part_are_those_of_the_whole_cut_to_it(lengths, size, data):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    whole = GroupedOrder(DocumentStarts.of(starts, size), 0).epoch(0)
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.n_tokens), min_size=2, max_size=6)))
    line = PartsOf(whole, [*zip(cuts[::2], cuts[1::2], strict=False)])
    tokens = {line: [], whole: []}
    for each, found in tokens.items():
        for number, piece in enumerate(each.pieces(0, each.n_tokens)):
            assert piece.number == number
            found += [(piece.start + k, number, piece.begins and k == 0) for k in range(piece.length)]
    expected = [token for begin, end in zip(cuts[::2], cuts[1::2], strict=False) for token in tokens[whole][begin:end]]
    assert [token[0] for token in tokens[line]] == [token[0] for token in expected]
    if line.n_tokens:
        numbers = line.numbers(np.arange(line.n_tokens))
        assert [token[1] for token in tokens[line]] == numbers.tolist()
        begin = data.draw(st.integers(0, line.n_tokens - 1))
        end = data.draw(st.integers(begin, line.n_tokens))
        part = [(p.start + k, p.begins and k == 0) for p in line.pieces(begin, end) for k in range(p.length)]
        assert part == [(token[0], token[2]) for token in tokens[line][begin:end]]


def test_groups_and_their_documents_are_drawn_anew_for_each_epoch_and_seed():
    starts = np.arange(0, 401, 10)
    orders = [
        documents_of(GroupedOrder(DocumentStarts.of(starts, 8), seed).epoch(epoch), starts)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    of_groups = [tuple(document // 8 for document in order[::8]) for order in orders]
    assert len(set(of_groups)) == 4
    inside = [tuple(document % 8 for document in order[at : at + 8]) for order in orders for at in range(0, 40, 8)]
    assert len(set(inside)) == 20


def test_only_the_groups_that_rows_are_in_are_read():
    class Counting:
        """Starts of a million documents of 10 tokens that are never listed."""

        def __init__(self):
            self.read = 0

        def __getitem__(self, places: slice) -> np.ndarray:
            self.read += places.stop - places.start
            return np.arange(places.start, places.stop, dtype=np.int64) * 10

    array, bounds = Counting(), np.arange(0, 1_000_001, 1000)
    split = Split(tensorstore.array(np.zeros(1)), DocumentStarts(array, bounds, bounds * 10), np.zeros(0))
    streams = made_streams(split, batch_size=4)
    for row in range(4):
        assert sum(segment.length for segment in streams.segments(row, 5_000_000, 5_000_100)) == 100
    # of two epochs before and of this one, the groups at both ends of each row; and of this one those that are read
    assert array.read <= (3 * 8 + 4) * 1001


@pytest.mark.parametrize("phases", [[dict(first_step=0, batch_size=2, update_len=5, skips=[])], None])
def test_a_run_that_began_before_there_were_groups_keeps_its_order(phases):
    """The oracle is what the first version did: one permutation of all documents."""
    split = corpus([9, 3, 4, 7, 2, 5, 8, 6])
    schedule = DataSchedule.from_json(phases) if phases else DataSchedule.begin(2, 5)
    begun = streams_of(schedule, split, 3)
    permutation = np.random.Generator(np.random.Philox(key=[3, 0])).permutation(8)
    expected = np.concatenate([np.arange(split.starts[n], split.starts[n + 1]) for n in permutation])[:22]
    read = [s.start + k for s in begun.segments(0, 0, 22) for k in range(s.length)]
    assert (read == expected.tolist()) == bool(phases)
    again = DataSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert again == schedule
    assert again.changed(4, 3, 5).now.order == schedule.now.order
    assert again.changed(4, 3, 5, data="other").now.order != LISTED


def test_a_corpus_of_one_group_has_the_order_of_before():
    split = corpus([9, 3, 4])
    for epoch in (0, 3):
        lines = [made_streams(split, 1, 5, version, epoch).segments(0, 0, 16) for version in (1, 2)]
        assert [*lines[0]] == [*lines[1]]


@pytest.mark.parametrize("killed_after", [None, 1, 5, 8])
def test_a_store_says_where_groups_begin_also_if_its_writer_was_killed(tmp_path, monkeypatch, killed_after):
    monkeypatch.setattr(writer, "GROUP", 4)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(checked, "BATCH_BYTES", 7)  # so that batches and groups begin at different documents
    texts = [b"x" * (1 + n % 5) for n in range(11)]
    data = DataSettings(source="a", validation_share=0.0, test_share=0.0, prepare_processes=1)

    def documents(last=None):
        for n, text in enumerate(texts):
            if n == last:
                raise KeyboardInterrupt
            yield Document(str(n), text)

    if killed_after is not None:
        with pytest.raises(KeyboardInterrupt):
            make_store(tmp_path / "store", lambda: documents(killed_after), ByteVocab(), data)
    make_store(tmp_path / "store", documents, ByteVocab(), data)
    store = TokenStore(tmp_path / "store")
    found = store.split("train").documents
    starts = np.concatenate([[0], np.cumsum([len(text) + 1 for text in texts])])
    np.testing.assert_array_equal(found.documents, [0, 4, 8, 11])
    np.testing.assert_array_equal(found.tokens, starts[[0, 4, 8, 11]])
    np.testing.assert_array_equal(np.concatenate([found.of_group(n)[:-1] for n in range(3)]), starts[:-1])
    np.testing.assert_array_equal(found.whole, starts)


def test_a_store_of_an_older_version_is_read_with_groups_of_its_own(tmp_path):
    data = DataSettings(source="a", validation_share=0.0, test_share=0.0, prepare_processes=1)
    store = make_store(
        tmp_path / "store", lambda: iter([Document("a", b"abc"), Document("b", b"de")]), ByteVocab(), data
    )
    meta = store.meta
    for entry in meta["splits"].values():
        del entry["groups"]
    meta.pop("crc32c")
    (tmp_path / "store/store.json").write_text(json.dumps(meta | dict(crc32c=writer.crc32c_of(meta))))
    split = TokenStore(tmp_path / "store").split("train")
    np.testing.assert_array_equal(split.documents.tokens, [0, 7])
    np.testing.assert_array_equal(split.documents.of_group(0), [0, 4, 7])
