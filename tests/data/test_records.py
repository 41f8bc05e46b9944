"""Files of many documents, plain and compressed: what is in them comes out, and damage is named."""

import gzip
import importlib.util
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tvq_pod.config.settings import DataSettings
from tvq_pod.data import compressed
from tvq_pod.data.corpora import documents
from tvq_pod.errors import UserError

TEXTS = ["one\ntwo", "漢\U0001f600", "", "x" * 100_000, "e\u0301 \u2028 \x00 end"]


def as_jsonl(texts, field="text") -> bytes:
    return "".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    return zstandard.compress(data)


COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}


def texts_of(path, **settings):
    return [bytes(document.text).decode() for document in documents(DataSettings(source=str(path), **settings))]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("block_bytes", [5, 2**12])
def test_json_lines_plain_and_compressed(tmp_path, monkeypatch, suffix, block_bytes):
    monkeypatch.setattr(compressed, "BLOCK_BYTES", block_bytes)
    path = tmp_path / f"docs{suffix}"
    # as pigz and many pipelines write them: several members or frames, one after the other
    path.write_bytes(COMPRESS[suffix](as_jsonl(TEXTS[:2])) + COMPRESS[suffix](as_jsonl(TEXTS[2:])))
    assert texts_of(path) == TEXTS
    path.write_bytes(COMPRESS[suffix](as_jsonl(["no newline at the end"]).rstrip()))
    assert texts_of(path) == ["no newline at the end"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_is_damaged_is_named(tmp_path, suffix):
    path, content = tmp_path / f"docs{suffix}", COMPRESS[suffix](as_jsonl(["abc" * n for n in range(300)]))
    for damaged in (content[: len(content) // 2], content[:-1], b"x" + content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"config.data.source=.*docs{suffix}: can't be read, or is damaged"):
            texts_of(path)


def write_parquet(path, texts, column="text", **options):
    table = pyarrow.table({column: texts, "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, **options)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet(tmp_path, compression):
    texts = TEXTS * 50
    write_parquet(tmp_path / "a.parquet", texts, compression=compression, row_group_size=30)
    assert texts_of(tmp_path / "a.parquet") == texts
    write_parquet(tmp_path / "b.parquet", [b"bytes"], column="body")
    assert texts_of(tmp_path / "b.parquet", text_field="body") == ["bytes"]


def test_parquet_that_has_no_text_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["fine", None])
    with pytest.raises(UserError, match=r"config.data.text_field=text: row 2 of .*a.parquet has null there"):
        texts_of(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"config.data.text_field=body: .*a.parquet does not have this column, only"):
        texts_of(tmp_path / "a.parquet", text_field="body")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"cut.parquet: can't be read, or is damaged"):
        texts_of(tmp_path / "cut.parquet")
    (tmp_path / "none.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"none.parquet: can't be read, or is damaged"):
        texts_of(tmp_path / "none.parquet")


def test_a_folder_of_such_files_is_read_in_the_order_of_their_paths(tmp_path):
    for name, suffix, texts in (("b", ".jsonl.zst", ["3"]), ("a/x", ".jsonl.gz", ["1", "2"]), ("c", ".jsonl", ["4"])):
        path = tmp_path / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(COMPRESS[suffix](as_jsonl(texts)))
    assert texts_of(tmp_path) == ["1", "2", "3", "4"]
    write_parquet(tmp_path / "d.parquet", ["5"])
    with pytest.raises(UserError, match=r"config.data.format=auto: .* has files of several formats \(jsonl, parquet\)"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, format="parquet") == ["5"]
    assert texts_of(tmp_path, glob="**/*.gz") == ["1", "2"]
    with pytest.raises(UserError, match=r"has no file whose name ends with .jsonl.* left out: 4 that config.data.glob"):
        texts_of(tmp_path, format="jsonl", glob="*.txt")


def test_what_needs_a_package_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("a.parquet", "a.jsonl.zst", "a.array_record"):
        (tmp_path / name).write_bytes(zstd(b"") if name.endswith("zst") else b"")
        with pytest.raises(UserError, match=r"needs pip install -e '\.\[data\]'"):
            texts_of(tmp_path / name)
