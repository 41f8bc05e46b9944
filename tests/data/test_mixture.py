"""Mixtures: shares as asked for, every document as often as the others of its store, a function of the step alone."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import store_of
from tests.data.made_streams import made_streams
from tvq_pod.data import order as order_module
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.order import mixed_order
from tvq_pod.data.store import Part, TokenStore
from tvq_pod.data.streams import PackedDocuments, read_row
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.errors import UserError

BIG = [f"big {n} ".encode() * (1 + n % 3) for n in range(40)]
SMALL = [f"small {n} ".encode() * 2 for n in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    store_of(folder / "big", BIG, validation_share=0.1)
    store_of(folder / "small", SMALL, validation_share=0.1)
    return folder


def mixture(folder, big=0.5, small=0.5):
    return Mixture.open(f"{folder}/big={big},{folder}/small={small}")


documents = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(documents, min_size=1, max_size=3), data=st.data())
def test_shares_are_as_asked_for_and_a_stores_documents_take_turns(lengths, data):
    weights = [data.draw(st.floats(0.1, 1.0)) for _ in lengths]
    weights = [weight / sum(weights) for weight in weights]
    flat = [n for part in lengths for n in part]
    starts = np.concatenate([[0], np.cumsum(flat)])
    firsts = np.cumsum([0, *map(len, lengths)])
    parts = [Part(int(first), len(part), w) for first, part, w in zip(firsts, lengths, weights, strict=False)]
    n_epochs = 6
    order = np.concatenate([mixed_order(starts, parts, 3, epoch) for epoch in range(n_epochs)])
    read = collections.Counter(order.tolist())
    total = sum(flat[document] for document in order)
    for part, own in zip(parts, lengths, strict=True):
        times = [read[part.first_document + n] for n in range(part.n_documents)]
        assert max(times) - min(times) <= 1
        share = sum(time * n for time, n in zip(times, own, strict=True))
        # whole documents are taken: each store may be one too far
        assert abs(share - part.weight * total) <= 2 * max(flat) * len(parts) + n_epochs


def test_streams_of_a_mixture_are_a_function_of_the_step_and_read_what_is_in_the_stores(folder):
    split = mixture(folder).split("train")
    streams = [made_streams(split, 3, seed=1) for _ in range(2)]
    seen = collections.Counter()
    for step in (4, 0, 2, 1, 3, 0):
        rows = [[read_row(split.tokens, each, row, step * 50, step * 50 + 50) for row in range(3)] for each in streams]
        for one, other in zip(*rows, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
            text = bytes((one["targets"][one["targets"] >= 3] - 3).astype(np.uint8))
            seen.update(word for word in text.split() if word in (b"big", b"small"))
    assert min(seen.values()) > 5


@pytest.mark.parametrize("name", ["train", "validation"])
def test_documents_of_a_mixture_are_those_of_its_stores(folder, name):
    def texts(split):
        tokens = split.tokens.read().result()
        return [tokens[begin:end].tobytes() for begin, end in itertools.pairwise(split.starts)]

    stores = [TokenStore(folder / "big"), TokenStore(folder / "small")]
    there = [store.split(name) for store in stores if store.meta["splits"][name]["n_documents"]]
    whole = mixture(folder).split(name)
    assert texts(whole) == [text for split in there for text in texts(split)]
    np.testing.assert_array_equal(whole.doc_bytes, np.concatenate([split.doc_bytes for split in there]))


def test_one_store_alone_is_read_once_an_epoch(folder):
    store = TokenStore(folder / "big")
    split = Mixture([store], [3.0]).split("train")
    for epoch in range(2):
        order = mixed_order(split.starts, split.parts, 0, epoch)
        assert sorted(order) == list(range(len(split.doc_bytes)))


def test_what_is_left_of_an_epoch_can_be_cut_anew(folder):
    split = mixture(folder).split("train")
    streams = made_streams(split, 2, seed=1)
    again = streams.recut(60, 3)
    first = mixed_order(split.starts, split.parts, 1, 0)
    n_tokens = int(np.diff(split.starts)[first].sum())
    left = sum(s.length for row in range(3) for s in again.segments(row, 0, (n_tokens - 120) // 3))
    assert left == (n_tokens - 120) // 3 * 3
    # and the next epoch of the new streams is the next one of the mixture
    one = made_streams(split, 1, seed=1)
    after = one.recut(n_tokens, 1)
    assert next(after.segments(0, 0, 40)).start == next(one.segments(0, n_tokens, n_tokens + 40)).start


def test_evaluation_reads_every_held_out_document_once(folder):
    whole, big = mixture(folder), TokenStore(folder / "big")
    split = whole.split("validation")
    n_held_out = [store.meta["splits"]["validation"]["n_documents"] for store in (big, TokenStore(folder / "small"))]
    assert len(split.doc_bytes) == sum(n_held_out) > 0
    assert sorted(PackedDocuments(split.starts, 2).documents) == list(range(len(split.doc_bytes)))
    with pytest.raises(UserError, match="--split=test: no document"):
        whole.split("test")


def test_the_fingerprint_is_of_stores_and_weights(folder):
    assert mixture(folder).fingerprint == mixture(folder, 2, 2).fingerprint
    assert mixture(folder).fingerprint != mixture(folder, 0.4, 0.6).fingerprint
    assert mixture(folder).meta["splits"]["train"]["n_documents"] == len(
        mixture(folder).split("train").doc_bytes
    )  # fmt: skip


def test_a_mixture_has_the_tokens_a_byte_that_are_read(tmp_path):
    class Wide(ByteVocab):
        """Two tokens a byte."""

        takes_any_bytes = False

        def encode(self, text):
            return np.repeat(super().encode(text), 2)

    store_of(tmp_path / "a", [b"x" * 999])  # 1000 tokens
    store_of(tmp_path / "b", [b"x" * 500], Wide())  # 1001 tokens
    whole = Mixture.open(f"{tmp_path}/a=3,{tmp_path}/b=1")
    assert whole.tokens_per_byte("train") == pytest.approx(1 / (0.75 * 999 / 1000 + 0.25 * 500 / 1001))


@pytest.mark.parametrize("text", ["{}/big", "{}/big=0", "{}/big=-1", "{}/big=x", "=1", "{}/big=1,,", "{}/big=inf"])
def test_what_is_no_mixture_is_named(folder, text):
    with pytest.raises(UserError, match=r"config.data.mixture=.*is not STORE=WEIGHT with a weight of 1e-6"):
        Mixture.open(text.format(folder))


def test_an_epoch_of_a_tiny_store_with_a_large_weight_fits_in_memory(monkeypatch):
    monkeypatch.setattr(order_module, "MIXED_DOCUMENTS", 1000)
    starts = np.concatenate([np.arange(10), 10 + 1000 * np.arange(101)])  # 10 documents of a token, 100 of a thousand
    parts = [Part(0, 10, 0.99), Part(10, 100, 0.01)]
    orders = [mixed_order(starts, parts, 0, epoch) for epoch in range(300)]
    assert max(map(len, orders)) < 1100
    read = np.bincount(np.concatenate(orders), minlength=110)
    assert read[:10].max() - read[:10].min() <= 1
    tokens = read[:10].sum(), 1000 * read[10:].sum()
    assert tokens[1] / sum(tokens) == pytest.approx(0.01, rel=0.4)


def test_stores_that_hold_out_other_documents_or_are_the_same_are_refused(folder, tmp_path):
    store_of(tmp_path / "other", BIG[:5], validation_share=0.2)
    with pytest.raises(UserError, match=r"big holds out \(0.1, 0.0\) for .*, and .*other \(0.2, 0.0\)"):
        Mixture.open(f"{folder}/big=1,{tmp_path}/other=1")
    with pytest.raises(UserError, match=r"the same documents are there twice"):
        Mixture.open(f"{folder}/big=1,{folder}/small=1,{folder}/big=2")


def test_stores_that_do_not_fit_each_other_or_are_not_there_are_named(folder, tmp_path):
    class Other(ByteVocab):
        name = "other"

    store_of(tmp_path / "other", [b"text"], Other())
    with pytest.raises(UserError, match=r"config.data.mixture: .*other has vocabulary other, and .*big bytes"):
        Mixture.open(f"{folder}/big=1,{tmp_path}/other=1")
    with pytest.raises(UserError, match=r"nowhere: is not a token store"):
        Mixture.open(f"{folder}/big=1,{tmp_path}/nowhere=1")
