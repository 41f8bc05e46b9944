"""Rows that have no text mean the same in every format; nested fields, and columns of other types, have text."""

import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from tests.data.test_open import TextOnlyVocab
from tests.data.texts import settings_for
from tvq_pod.config.settings import DataSettings
from tvq_pod.data.build import make_store
from tvq_pod.data.corpora import documents
from tvq_pod.data.open import check_source
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.errors import UserError

SURROGATE = '{"text": "half \\ud83d of a pair"}'


def write_array_record(path: pathlib.Path, rows: list[bytes]) -> pathlib.Path:
    writer = ArrayRecordWriter(str(path), "group_size:2")
    for row in rows:
        writer.write(row)
    writer.close()
    return path


def write_jsonl(path: pathlib.Path, rows: list[bytes]) -> pathlib.Path:
    path.write_bytes(b"\n".join(rows))
    return path


def write_parquet(path: pathlib.Path, values: list, kind=None, name="text") -> pathlib.Path:
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, kind), "id": range(len(values))}), path)
    return path


def not_utf8_strings() -> pyarrow.Array:
    return pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(np.array([0, 4, 8], np.int32)), pyarrow.py_buffer(b"goodcaf\xe9")]
    )


JSON_ROWS = [b'{"text": "good"}', None, b'{"text": "also"}']
BAD_JSON = {
    "null instead of text": b'{"text": null}', "without the field text": b'{"body": "x"}',
    "not text": b'{"text": [1, "x"]}', "not UTF-8": b'{"text": "caf\xe9"}',
    "half of a surrogate pair": SURROGATE.encode(), "not JSON": b'{"text": "x', "nested too deeply": b"[" * 100_000,
}  # fmt: skip
CASES = [
    *((writer, suffix, why, [bad if row is None else row for row in JSON_ROWS])
      for writer, suffix in ((write_jsonl, ".jsonl"), (write_array_record, ".array_record"))
      for why, bad in BAD_JSON.items()),
    (write_parquet, ".parquet", "null instead of text", ["good", None, "also"]),
]  # fmt: skip


def make(path, tmp_path, vocab=None, **settings):
    data = DataSettings(source=str(path), validation_share=0.0, test_share=0.0, **settings)
    return make_store(tmp_path / "store", lambda: documents(data), vocab or ByteVocab(), data)


def texts(path, **settings) -> list[str]:
    found = documents(DataSettings(source=str(path), **settings))
    return [bytes(document.text).decode() for document in found if not document.problem]


@pytest.mark.parametrize(("write", "suffix", "why", "rows"), CASES, ids=[f"{case[1]} {case[2]}" for case in CASES])
def test_a_row_without_text_is_an_error_or_is_left_out_and_counted(tmp_path, capsys, write, suffix, why, rows):
    path = write(tmp_path / f"docs{suffix}", rows)
    with pytest.raises(
        UserError, match=r"^config.data.\w+=(?=.*docs)(?=.*(line|row|record) 2 ).*or give config.data.bad_rows=skip$"
    ):
        make(path, tmp_path)
    assert not (tmp_path / "store").exists()
    store = make(path, tmp_path, bad_rows="skip")
    assert store.meta["splits"]["train"]["n_documents"] == 2
    assert f"leaves out 1 ({why}): docs{suffix}:2" in capsys.readouterr().err
    assert texts(path, bad_rows="skip") == ["good", "also"]


@pytest.mark.parametrize("kind", ["strings", "bytes", "records"])
def test_rows_that_are_not_utf8_are_bad_for_a_vocabulary_of_text_in_every_format(tmp_path, capsys, kind):
    if kind == "records":
        path = write_array_record(tmp_path / "docs.array_record", [b"good", b"caf\xe9"])
    else:
        values = not_utf8_strings() if kind == "strings" else [b"good", b"caf\xe9"]
        path = write_parquet(tmp_path / "docs.parquet", values)
    with pytest.raises(
        UserError, match=r"^config.data.bad_rows=error: docs.*:2 is not UTF-8 at byte 3, .*or give skip"
    ):
        make(path, tmp_path, TextOnlyVocab(), invalid_utf8="skip")
    store = make(path, tmp_path, TextOnlyVocab(), bad_rows="skip")
    assert store.meta["splits"]["train"]["n_documents"] == 1
    assert f"leaves out 1 (not UTF-8): {path.name}:2" in capsys.readouterr().err
    as_bytes = make_store(tmp_path / "b", lambda: documents(data), ByteVocab(), data := DataSettings(source=str(path)))
    assert sum(entry["n_bytes"] for entry in as_bytes.meta["splits"].values()) == 8  # a byte model takes any


def test_many_bad_rows_are_counted_by_reason_with_the_first_three_places(tmp_path, capsys):
    rows = [b'{"text": null}'] * 5 + [b"{"] * 2 + [b'{"text": "good"}']
    make(write_jsonl(tmp_path / "docs.jsonl", rows), tmp_path, bad_rows="skip")
    said = capsys.readouterr().err
    assert "leaves out 5 (null instead of text): docs.jsonl:1, docs.jsonl:2, docs.jsonl:3, ...\n" in said
    assert "leaves out 2 (not JSON): docs.jsonl:6, docs.jsonl:7\n" in said


def test_a_corpus_of_which_every_row_is_bad_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", [b'{"body": "x"}'] * 4)
    settings = settings_for(path, bad_rows="skip")
    with pytest.raises(UserError, match=r"is empty; .*; 4 files or rows left out, the last one: without the field"):
        check_source(settings, epath.Path(tmp_path / "run"))


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    assert texts(write_jsonl(tmp_path / "a.jsonl", [b'{"text": "\\ud83d\\ude00"}'])) == ["\U0001f600"]


# ------------------------------------------------- fields
def test_fields_of_fields_are_reached_with_dots(tmp_path):
    rows = [dict(meta=dict(text=f"t{n}", n=n), text="other") for n in range(3)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [json.dumps(row).encode() for row in rows])
    records = write_array_record(tmp_path / "a.array_record", [json.dumps(row).encode() for row in rows])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (jsonl, records, tmp_path / "a.parquet"):
        assert texts(path, text_field="meta.text") == ["t0", "t1", "t2"]
        with pytest.raises(UserError, match=r"config.data.text_field=meta.body: .*does not have this"):
            texts(path, text_field="meta.body")
        assert texts(path, text_field="meta.n", bad_rows="skip") == []
    dotted = [dict({"meta.text": "whole name"}, meta=dict(text="part"))]
    assert texts(write_jsonl(tmp_path / "b.jsonl", [json.dumps(dotted[0]).encode()]), text_field="meta.text") == [
        "whole name"
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dotted), tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet", text_field="meta.text") == ["whole name"]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict(meta=dict(text="x")), dict(meta=None)]), tmp_path / "c.parquet"
    )
    assert texts(tmp_path / "c.parquet", text_field="meta.text", bad_rows="skip") == ["x"]


TYPES = [
    pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("is_nested", [False, True])
def test_columns_of_every_type_of_text_are_read(tmp_path, kind, is_nested):
    values = ["one", "漢字", "one", "", None] * 40
    column = pyarrow.array(values, pyarrow.string()).cast(kind)
    name = "text"
    if is_nested:
        column, name = pyarrow.StructArray.from_arrays([column], ["text"]), "meta"
    size = 1000 if is_nested and kind == pyarrow.string_view() else 70  # pyarrow can't slice the other to write it
    pyarrow.parquet.write_table(pyarrow.table({name: column}), tmp_path / "a.parquet", row_group_size=size)
    found = texts(tmp_path / "a.parquet", bad_rows="skip", text_field="meta.text" if is_nested else "text")
    assert found == ["one", "漢字", "one", ""] * 40


def test_a_column_without_text_is_named_or_all_its_rows_are_left_out(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", ["good"])
    write_parquet(tmp_path / "b.parquet", [1, 2, 3])
    write_parquet(tmp_path / "c.parquet", ["x"], name="body")
    with pytest.raises(UserError, match=r"config.data.text_field=text: .*b.parquet has int64 there, and not text"):
        texts(tmp_path)
    make(tmp_path, tmp_path.parent, bad_rows="skip")
    said = capsys.readouterr().err
    assert "leaves out 3 (another type than text): b.parquet:1, b.parquet:2, b.parquet:3\n" in said
    assert "leaves out 1 (without the field text): c.parquet:1\n" in said


def test_a_column_that_is_there_twice_is_named(tmp_path):
    rows = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"config.data.text_field=text: .*a.parquet has 2 columns text;"):
        texts(tmp_path)


# ------------------------------------------------- ArrayRecord
def test_array_records_are_texts_or_json(tmp_path):
    raw = write_array_record(
        tmp_path / "raw.array_record-00000-of-00001", [b"one\n", b"", "漢".encode(), b'{"text": "x"}']
    )
    assert texts(raw) == ["one\n", "", "漢", '{"text": "x"}']
    both = write_array_record(tmp_path / "json.array_record", [b'{"text": "x"}', b'{"text": "y", "id": 3}'])
    assert texts(both) == ["x", "y"]
    assert texts(both, text_field="") == ['{"text": "x"}', '{"text": "y", "id": 3}']
    many = write_array_record(tmp_path / "many.arrayrecord", [str(n).encode() for n in range(5000)])
    assert texts(many) == [str(n) for n in range(5000)]
    assert texts(tmp_path, exclude="many.*") == ["x", "y", "one\n", "", "漢", '{"text": "x"}']


def test_an_array_record_that_is_damaged_is_named(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [str(n).encode() * 50 for n in range(4000)])
    content = path.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"",
        b"no record " * 20_000,
        content[:3000] + b"\xff" + content[3001:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"config.data.source=.*a.array_record: can't be read, or is damaged"):
            texts(path)
