"""Loss of each document, with the names that the store keeps of held-out documents."""

import json
import os
import shutil

import numpy as np
import pytest
from etils import epath

from tests.common import store_of
from tests.data.texts import settings_for
from tvq_pod.data import store as store_module
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.open import open_store
from tvq_pod.data.store import TokenStore
from tvq_pod.errors import UserError
from tvq_pod.inference.by_document import check_table, write_documents

NAMES = ["a.txt", "with\ttab\nand newline", "ü漢 name", os.fsdecode(b"\xff odd"), "last.txt"]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus/test").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (tmp_path / "corpus/test" / name).write_bytes(b"text " * (number + 1))
    return tmp_path / "corpus"


@pytest.fixture
def store(corpus, tmp_path):
    return open_store(settings_for(corpus), epath.Path(tmp_path / "run"))


def rows_of(path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_a_line_has_number_name_tokens_bytes_and_loss(store, tmp_path):
    nats = np.array([10.0, np.nan, 30.0, 40.0, 50.0])
    write_documents(epath.Path(tmp_path / "table.tsv"), nats, store.split("test"), store.names("test"))
    header, *rows = rows_of(tmp_path / "table.tsv")
    assert header == ["document", "name", "tokens", "bytes", "loss"]
    assert [row[0] for row in rows] == ["0", "2", "3", "4"]  # in the order of the paths, without the one not evaluated
    assert [row[1] for row in rows] == [
        "test/a.txt",
        "test/with\\ttab\\nand newline",
        "test/ü漢 name",
        "test/\\udcff odd",
    ]
    lengths = {name: 5 * (number + 1) for number, name in enumerate(NAMES)}
    assert [int(row[3]) for row in rows] == [lengths[name] for name in ("a.txt", NAMES[1], NAMES[2], NAMES[3])]


def test_names_change_nothing_that_a_batch_depends_on(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "arrays_of", lambda split: store_module.ARRAYS)
    shutil.rmtree(store.path / "test/names")
    meta = {name: value for name, value in store.meta.items() if name != "crc32c"}
    meta["arrays"] = {name: value for name, value in meta["arrays"].items() if not name.endswith("names")}
    (store.path / "store.json").write_text(json.dumps(meta | dict(crc32c=store_module.crc32c_of(meta))))
    older = TokenStore(store.path)  # as one that was made before there were names
    assert older.fingerprint == store.fingerprint
    assert older.names("test") == ["0", "1", "2", "3", "4"]
    assert len(older.split("test").lengths) == 5


def test_names_are_no_part_of_the_fingerprint(store, corpus, tmp_path):
    for name in NAMES:
        (corpus / "test" / name).rename(corpus / "test" / f"{name}2")
    other = open_store(settings_for(corpus), epath.Path(tmp_path / "other"))
    assert other.names("test") != store.names("test")
    assert other.fingerprint == store.fingerprint


def test_names_that_are_damaged_are_named(store):
    shard = store.path / "test/names/c/0"
    content = bytearray(shard.read_bytes())
    content[9] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"config.data.store=.*: is damaged"):
        TokenStore(store.path).names("test")


def test_names_of_a_mixture_are_of_its_stores_in_their_order(tmp_path):
    stores = [
        store_of(tmp_path / name, [f"{name} {n}".encode() for n in range(40)], validation_share=0.3) for name in "ab"
    ]
    mixture = Mixture.open(f"{tmp_path}/a=1,{tmp_path}/b=1")
    expected = [f"{store.path}: {name}" for store in stores for name in store.names("validation")]
    assert mixture.names("validation") == expected
    assert len(expected) == len(mixture.split("validation").lengths)


@pytest.mark.slow
def test_names_are_kept_by_a_prepare_that_is_broken_off(tmp_path, monkeypatch):
    from tvq_pod.data import checked, writer

    texts = [f"document {n}".encode() for n in range(200)]
    whole = store_of(tmp_path / "whole", texts, validation_share=0.3)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(checked, "BATCH_SECONDS", 0.0)
    taken, append = [], writer.SplitWriter.append_documents

    def broken(self, *given, **more):
        taken.append(1)
        if len(taken) == 77:
            raise KeyboardInterrupt
        return append(self, *given, **more)

    monkeypatch.setattr(writer.SplitWriter, "append_documents", broken)
    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path / "s", texts, validation_share=0.3)
    assert len(taken) == 77
    store = store_of(tmp_path / "s", texts, validation_share=0.3)
    assert len(taken) < 77 + 200, "it went on, and did not begin anew"
    assert store.names("validation") == whole.names("validation")
    assert store.fingerprint == whole.fingerprint


def test_a_table_that_can_not_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--per_document=.*: is a folder; give a file$"):
        check_table(epath.Path(tmp_path))
    with pytest.raises(UserError, match=r"^--per_document=.*/file/x/t.tsv: can't be written \(.*\); give another"):
        check_table(epath.Path(tmp_path / "file/x/t.tsv"))
    check_table(epath.Path(tmp_path / "new/t.tsv"))
    assert (tmp_path / "new").is_dir()
