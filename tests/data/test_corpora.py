"""Corpora in their formats, and what is said of bad ones."""

import json

import pytest

from tvq_pod.config import DataSettings
from tvq_pod.data.corpora import documents
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.errors import UserError
from tvq_pod.prepare import tokenized


def texts(**changes):
    return [text for _, text in documents(DataSettings(**changes))]


def test_the_standard_library_is_there():
    found = dict(documents(DataSettings(source="stdlib")))
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


def test_each_line_is_a_document(tmp_path):
    (tmp_path / "lines.txt").write_bytes("one\r\n\ntwo é\nthree".encode())
    assert texts(source=str(tmp_path / "lines.txt")) == [b"one", b"", "two é".encode(), b"three"]


def test_each_json_line_has_a_document(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps(dict(body=text)) for text in ("one\ntwo", "漢\U0001f600", "")) + "\n\n")
    assert texts(source=str(path), text_field="body") == [b"one\ntwo", "漢\U0001f600".encode(), b""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"config.data.source=.*: line 2 is not JSON"),
        ('{"body": "x"}', "config.data.text_field=text: line 2 of .* has no such field"),
        ('{"text": 3}', "config.data.text_field=text: line 2 of .* has no text there"),
        ("3", "config.data.text_field=text: line 2 of .* has no such field"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        texts(source=str(path))


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config.data.source=.*nowhere: is not there"):
        texts(source=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config.data.source=: is not there"):
        texts()
    with pytest.raises(UserError, match=r"must be a folder, as config.data.format=folder says"):
        texts(source=str(tmp_path / "nowhere"), format="folder")


class TextOnlyVocab(ByteVocab):
    takes_any_bytes = False


@pytest.mark.parametrize("invalid_utf8", ["error", "replace", "skip"])
def test_documents_that_are_not_utf8(invalid_utf8, capsys):
    docs = [("good", b"fine"), ("bad", b"caf\xe9"), ("empty", b"")]
    data = DataSettings(invalid_utf8=invalid_utf8)
    # a byte model takes the bytes as they are, and says so
    assert [text for text, _ in tokenized(iter(docs), ByteVocab(), data)] == [b"fine", b"caf\xe9"]
    said = capsys.readouterr().err
    assert "1 documents are not UTF-8, a byte model takes their bytes as they are: bad" in said
    assert "1 empty documents left out: empty" in said
    if invalid_utf8 == "error":
        with pytest.raises(UserError, match=r"config.data.invalid_utf8=error: bad is not UTF-8 at byte 3"):
            list(tokenized(iter(docs), TextOnlyVocab(), data))
    else:
        kept = [text for text, _ in tokenized(iter(docs), TextOnlyVocab(), data)]
        assert kept == [b"fine"] + (["caf\ufffd".encode()] if invalid_utf8 == "replace" else [])
