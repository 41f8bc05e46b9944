"""Corpora in their formats, and what is said of bad ones."""

import json
import os

import pytest

from tvq_pod.config.settings import DataSettings
from tvq_pod.data import document as document_module
from tvq_pod.data.corpora import documents
from tvq_pod.errors import UserError


def texts(**changes):
    return [bytes(document.text) for document in documents(DataSettings(**changes))]


@pytest.mark.slow(2)
def test_the_standard_library_is_there():
    found = {document.name: document.text for document in documents(DataSettings(source="stdlib"))}
    assert len(found) > 500
    assert sum(map(len, found.values())) > 5e6
    assert b"import" in found["json/__init__.py"]
    assert not any("site-packages" in name for name in found)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/one.txt").write_bytes(b"1")
    (tmp_path / "a.txt").write_bytes(b"a\r\n")
    (tmp_path / "c.md").write_bytes(b"c")
    assert texts(source=str(tmp_path)) == [b"a\r\n", b"1", b"c"]
    assert texts(source=str(tmp_path), glob="**/*.md") == [b"c"]


@pytest.mark.parametrize("glob", ["", "/x"])
def test_a_glob_that_is_no_pattern_is_named(tmp_path, glob):
    with pytest.raises(UserError, match=rf"^config.data.glob={glob}: is not a pattern"):
        texts(source=str(tmp_path), format="folder", glob=glob)


def test_what_is_compressed_is_no_text(tmp_path):
    (tmp_path / "texts.zip").write_bytes(b"PK...")
    with pytest.raises(UserError, match=r"config.data.format=auto: .*texts.zip is compressed, and not text"):
        texts(source=str(tmp_path / "texts.zip"))
    with pytest.raises(UserError, match=r"does not exist"):
        texts(source="x" * 5000)


def test_a_folder_that_can_not_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # as for a user that is not root
    with pytest.raises(UserError, match=r"config.data.source: .*closed can't be read \(Permission denied\)"):
        texts(source=str(tmp_path))


def test_each_line_is_a_document(tmp_path):
    (tmp_path / "ends.txt").write_bytes(b"one\r\r\n\r")
    assert texts(source=str(tmp_path / "ends.txt"), format="lines") == [b"one\r", b""]
    (tmp_path / "lines.txt").write_bytes("one\r\n\ntwo é\nthree".encode())
    assert texts(source=str(tmp_path / "lines.txt"), format="lines") == [b"one", b"", "two é".encode(), b"three"]


def test_each_json_line_has_a_document(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps(dict(body=text)) for text in ("one\ntwo", "漢\U0001f600", "")) + "\n\n")
    assert texts(source=str(path), text_field="body") == [b"one\ntwo", "漢\U0001f600".encode(), b""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"config.data.source=.*: line 2 is not JSON"),
        ('{"body": "x"}', "config.data.text_field=text: line 2 of .* does not have this field"),
        ('{"text": 3}', "config.data.text_field=text: line 2 of .* has a number there instead of text"),
        ("3", "config.data.text_field=text: line 2 of .* does not have this field"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        texts(source=str(path))


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config.data.source=.*nowhere: does not exist"):
        texts(source=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config.data.source=: does not exist"):
        texts()
    with pytest.raises(UserError, match=r"must be a folder, as config.data.format=folder says"):
        texts(source=str(tmp_path / "nowhere"), format="folder")


def test_a_big_file_stays_on_disk_and_has_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(document_module, "BIG_FILE", 10)
    (tmp_path / "a.txt").write_bytes(b"more than ten bytes")
    (document,) = documents(DataSettings(source=str(tmp_path)))
    assert isinstance(document.text, memoryview)
    assert bytes(document.text) == b"more than ten bytes"
