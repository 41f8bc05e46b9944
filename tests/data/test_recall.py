"""Generated corpora: what their documents are, and which of their values can be known."""

import dataclasses
import hashlib

import numpy as np
import pytest

from tvq_pod.config.resolve import default_config, resolve
from tvq_pod.config.settings import KEY_LETTERS, DataSettings
from tvq_pod.data import recall
from tvq_pod.data import store as store_module
from tvq_pod.data.build import make_store
from tvq_pod.data.corpora import documents
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.open import open_store
from tvq_pod.data.vocab import END_OF_DOC, ByteVocab
from tvq_pod.errors import UserError

SMALL = DataSettings(recall_documents=6, recall_held_out=3, recall_bytes=900, recall_pairs=8, recall_keys=20)
KINDS = ["recall", "passkey"]


def texts(split=None, **changes):
    data = dataclasses.replace(SMALL, **changes)
    return [bytes(document.text) for document in documents(data) if split in (None, document.split)]


def pairs_of(text, key_bytes):
    """(where the value is, key, value), read letter by letter."""
    found = []
    for at, letter in enumerate(text):
        if letter in recall.VALUES:
            key = text[at - key_bytes : at]
            assert len(key) == key_bytes
            assert set(key) <= set(recall.KEYS)
            found.append((at, key, letter))
    return found


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize(("key_bytes", "n_keys"), [(1, 20), (2, 300)])
def test_a_key_has_one_value_in_its_document_and_others_in_others(source, key_bytes, n_keys):
    tables = []
    for text in texts(source=source, recall_key_bytes=key_bytes, recall_keys=n_keys):
        table = {}
        for _, key, value in pairs_of(text, key_bytes):
            assert table.setdefault(key, value) == value
        assert len(table) == SMALL.recall_pairs
        tables.append(table)
    assert len({tuple(sorted(table.items())) for table in tables}) == len(tables) == 12
    assert len({frozenset(table) for table in tables}) > 1
    pairs = {pair for table in tables for pair in table.items()}
    assert len(pairs) > len({key for key, _ in pairs})


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize(("key_bytes", "n_keys"), [(1, 20), (2, 300)])
def test_distances_are_those_since_the_key_was_seen_and_there_where_it_was(source, key_bytes, n_keys):
    """All documents at once, as they lie on a row; the oracle reads each alone, with a dict."""
    tokens, doc_ids, expected = [], [], []
    for number, text in enumerate(texts(source=source, recall_key_bytes=key_bytes, recall_keys=n_keys)):
        last, of_text = {}, [0] * (len(text) + 1)
        for at, key, _ in pairs_of(text, key_bytes):
            of_text[at] = at - last.get(key, at)
            last[key] = at
        tokens += [*ByteVocab().encode(text).tolist(), END_OF_DOC]
        doc_ids += [number] * len(of_text)
        expected += of_text
    found = recall.distances(np.array(tokens), np.array(doc_ids))
    np.testing.assert_array_equal(found, expected)
    assert np.count_nonzero(found) > 100
    no_pairs = np.array([*ByteVocab().encode(b"!! ! a !!"), END_OF_DOC, 0, 0])
    assert not recall.distances(no_pairs, np.zeros(12, int)).any()


def test_recall_begins_with_its_table_and_asks_at_all_distances():
    found = []
    for text in texts(source="recall", recall_bytes=4097, recall_documents=20):
        pairs = pairs_of(text, 1)
        assert [at for at, _, _ in pairs] == list(range(1, 4096, 2))  # whole pairs, and nothing else
        assert len({key for _, key, _ in pairs[:8]}) == 8
        found.append(recall.distances(ByteVocab().encode(text), np.zeros(len(text), int)))
    for distance in 2 ** np.arange(1, 12):
        assert np.count_nonzero((np.array(found) >= distance) & (np.array(found) < 2 * distance)) > 20, distance


def test_passkey_states_each_pair_early_and_asks_for_all_of_them_at_the_end():
    for text in texts(source="passkey"):
        assert len(text) == SMALL.recall_bytes
        keys = [key for _, key, _ in pairs_of(text, 1)]
        assert set(keys[-8:]) == set(keys)
        assert len(text[-8 * 3 :].split()) == 8
        assert len({key for at, key, _ in pairs_of(text, 1) if at < len(text) // 4}) == 8
        words = [word for word in text.split() if word[-1] not in recall.VALUES]
        assert len(words) > 80


@pytest.mark.parametrize("source", KINDS)
def test_every_split_has_documents_of_its_own(source):
    by_split = {split: set(texts(split, source=source)) for split in ("train", "validation", "test")}
    assert [len(found) for found in by_split.values()] == [6, 3, 3]
    assert len(set.union(*by_split.values())) == 12


@pytest.mark.parametrize("source", KINDS)
def test_a_document_depends_on_its_number_and_the_seed_alone(source):
    """More of them change none, another seed changes all."""
    some = texts("train", source=source)
    assert texts("train", source=source, recall_documents=9)[:6] == some
    assert texts("train", source="", format=source) == some
    assert not set(texts("train", source=source, recall_seed=1)) & set(some)


def test_random_numbers_are_those_of_shake_128_on_every_machine():
    draws = recall.Draws("a name")
    numbers = [draws.below(2**32) for _ in range(recall.DRAWN_AT_ONCE + 1)]
    for counter, at in ((0, 0), (1, recall.DRAWN_AT_ONCE)):
        digest = hashlib.shake_128(f"a name {counter}".encode()).digest(4)
        assert numbers[at] == int.from_bytes(digest, "little")
    assert sorted(draws.some(range(9), 9)) == list(range(9))
    assert set(texts("train", source="recall")[0]) <= set(recall.KEYS + recall.VALUES)
    assert len(recall.KEYS) == KEY_LETTERS
    assert len({recall.key_text(key, 2) for key in range(KEY_LETTERS**2)}) == KEY_LETTERS**2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(recall_values=1), "config.data.recall_values=1: must be at least 2 and at most 32"),
        (
            dict(recall_keys=63),
            "config.data.recall_keys=63: there are 62 keys of .*at most that or give config.data.re",
        ),
        (dict(recall_keys=4000, recall_key_bytes=2), "config.data.recall_keys=4000: .*; give at most that$"),
        (dict(recall_pairs=33), "config.data.recall_pairs=33: .*; give at most config.data.recall_keys=32$"),
        (dict(recall_bytes=65), "config.data.recall_bytes=65: .*; give at least 66, or fewer config.data.recall_pairs"),
        (dict(source="passkey", recall_bytes=99), "config.data.recall_bytes=99: .*; give at least 400,"),
        (dict(vocab="sentencepiece"), "config.data.vocab=sentencepiece: must be bytes with the corpus recall"),
    ],
)
def test_what_has_no_documents_is_named_and_the_remedy_has(changes, message):
    config = default_config()
    config.data.update(dict(source="recall") | changes)
    with pytest.raises(UserError, match=f"^{message}"):
        resolve(config)
    config.data.update(dict(source="stdlib", vocab="bytes", recall_values=32))
    resolve(config)  # another corpus asks for none of these


@pytest.mark.parametrize(("source", "least"), [("recall", 66), ("passkey", 400)])
def test_the_shortest_documents_have_every_pair(source, least):
    for text in texts(source=source, recall_bytes=least, recall_pairs=32, recall_keys=32, recall_documents=50):
        assert len({key for _, key, _ in pairs_of(text, 1)}) == 32
        assert recall.distances(ByteVocab().encode(text), np.zeros(least, int)).any()


def test_a_store_says_how_its_documents_were_generated(tmp_path):
    data = dataclasses.replace(SMALL, source="recall", store=str(tmp_path / "store"))
    store = make_store(data.store, lambda: documents(data), ByteVocab(), data)
    assert store.recall_values == 32
    config = default_config()
    config.data.update(dataclasses.asdict(data) | dict(recall_seed=7))
    with pytest.raises(UserError, match=r"config.data.recall_seed=7: the store .* was prepared with 0"):
        open_store(resolve(config), tmp_path)
    other = dataclasses.replace(data, store=str(tmp_path / "other"), validation_share=0.3, recall_values=4)
    make_store(other.store, lambda: documents(other), ByteVocab(), other)
    mixture = Mixture.open(f"{data.store}=1,{other.store}=1")
    assert mixture.recall_values == 32
    assert mixture.meta["splits"]["validation"]["n_documents"] == 6


def test_a_store_made_before_there_were_smaller_documents_has_none(tmp_path, monkeypatch):
    data = dataclasses.replace(SMALL, source="recall", store=str(tmp_path / "store"))
    with monkeypatch.context() as before:
        before.setattr(store_module, "RECALL_MADE_WITH", set(store_module.RECALL_MADE_WITH) - {"recall_smaller"})
        made = make_store(data.store, lambda: documents(data), ByteVocab(), data)
    assert "recall_smaller" not in made.meta["made_with"]
    config = default_config()
    config.data.update(dataclasses.asdict(data))
    open_store(resolve(config), tmp_path)
    config.data.recall_smaller = 2
    with pytest.raises(UserError, match=r"config.data.recall_smaller=2: the store .* was prepared with 0"):
        open_store(resolve(config), tmp_path)


def test_documents_to_train_on_have_smaller_sizes_too_with_as_many_tokens_in_each():
    changes = dict(source="recall", recall_smaller=3, recall_bytes=256, recall_pairs=16)
    sizes = [(len(text), n_keys(text)) for text in texts("train", recall_documents=3000, **changes)]
    assert set(sizes) == {(256, 16), (128, 16), (64, 8), (32, 4)}
    shares = [sum(n_bytes for n_bytes, _ in sizes if n_bytes == n) for n in (256, 128, 64, 32)]
    np.testing.assert_allclose(np.array(shares) / sum(shares), 0.25, atol=0.04)  # the largest: 200 documents +- 14
    for split in ("validation", "test"):
        assert texts(split, **changes) == texts(split, **changes | dict(recall_smaller=0))


def n_keys(text: bytes) -> int:
    return len(set(text[::2]))


def test_the_smallest_documents_still_ask_for_a_pair():
    for text in texts(
        "train", source="recall", recall_smaller=9, recall_bytes=64, recall_pairs=8, recall_documents=100
    ):
        assert len(text) >= 6
        assert 2 <= n_keys(text) < len(text) // 2
