"""Compressed files are read through in every format, whatever their names; other binary files are no text."""

import bz2
import gzip
import io
import lzma
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from tests.command import ROOT
from tests.common import store_of
from tvq_pod.config.settings import DataSettings
from tvq_pod.data import document as document_module
from tvq_pod.data.build import make_store
from tvq_pod.data.corpora import documents
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.errors import UserError

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TEXT = "one line\nanother, 漢字\n" * 200
JSON = '{"text": "first"}\n{"text": "second"}\n'


def texts(source, **settings) -> list[str]:
    data = DataSettings(source=str(source), **dict(holdout="hash") | settings)
    return [bytes(document.text).decode() for document in documents(data)]


def parquet_bytes(*rows: str) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(text=list(rows))), file)
    return file.getvalue()


def array_record_bytes(*rows: bytes) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        writer = ArrayRecordWriter(file.name, "group_size:1")
        for row in rows:
            writer.write(row)
        writer.close()
        return pathlib.Path(file.name).read_bytes()


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
@pytest.mark.parametrize("ending", ["", "its own"])
def test_every_format_is_read_through_every_compression_known_by_its_bytes(tmp_path, compress, ending):
    ending = next(name for name, value in COMPRESS.items() if value is compress) if ending else ""
    for kind, name, content, expected in (
        ("folder", "a.txt", TEXT.encode(), [TEXT]),
        ("text", "a.txt", TEXT.encode(), [TEXT]),
        ("lines", "a.txt", TEXT.encode(), TEXT.splitlines()),
        ("jsonl", "a.jsonl", JSON.encode(), ["first", "second"]),
        ("auto", "b.json", JSON.encode(), ["first", "second"]),
        ("parquet", "a.parquet", parquet_bytes("first", "second"), ["first", "second"]),
        ("arrayrecord", "a.array_record", array_record_bytes(b"first", b"second"), ["first", "second"]),
    ):
        path = tmp_path / kind / f"{name}{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(compress(content))
        source = path.parent if kind == "folder" else path
        assert texts(source, format=kind, holdout="hash") == expected, kind


def test_a_name_that_says_compressed_is_not_believed_against_the_bytes(tmp_path):
    (tmp_path / "plain.jsonl.gz").write_text(JSON)  # as a download that unpacks what it gets leaves it
    assert texts(tmp_path / "plain.jsonl.gz") == ["first", "second"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/text.gz").write_text(TEXT)
    assert texts(tmp_path / "a") == [TEXT]
    (tmp_path / "a/text.gz").write_bytes(b"\x1f\x8c" + gzip.compress(TEXT.encode())[2:])
    with pytest.raises(UserError, match=r"a/text.gz: can't be read, or is damaged \(it does not begin as a .gz file\)"):
        texts(tmp_path / "a")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_text_that_is_cut_off_is_named_and_not_trained_on(tmp_path, suffix):
    whole = COMPRESS[suffix](TEXT.encode())
    (tmp_path / f"a.txt{suffix}").write_bytes(whole[: len(whole) - 9])
    with pytest.raises(UserError, match=rf"config.data.source=.*a.txt{suffix}: can't be read, or is damaged"):
        texts(tmp_path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_of_several_parts_are_read_to_their_end_and_what_is_no_part_is_damage(tmp_path, suffix):
    """As parallel compressors write them, and `cat`. A library's own reader may take a damaged part for the end."""
    one, two = (COMPRESS[suffix](text.encode()) for text in ("first\n", "second\n"))
    path = tmp_path / f"a.txt{suffix}"
    padding = {".gz": bytes(512), ".xz": bytes(8), ".zst": b"\x50\x2a\x4d\x18\x04\0\0\0skip", ".bz2": b""}[suffix]
    path.write_bytes(one + padding + two + padding)
    assert texts(path) == ["first\nsecond\n"]
    for end in (b"garbage", b"\xff" + two[1:], two[: len(two) // 2]):
        path.write_bytes(one + end)
        with pytest.raises(UserError, match=rf"config.data.source=.*a.txt{suffix}: can't be read, or is damaged"):
            texts(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
def test_what_is_not_utf8_by_its_mark_is_not_cut_into_lines(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" * encoding.endswith("be") + TEXT).encode(encoding))
    for settings in (dict(format="lines"), dict(format="jsonl"), dict(holdout="position")):
        with pytest.raises(UserError, match=r"source=.*a.txt: is UTF-16 or UTF-32, .*`iconv"):
            texts(path, **settings)
    (document,) = documents(DataSettings(source=str(path), holdout="hash"))
    assert bytes(document.text) == path.read_bytes()


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inner.txt", TEXT)
    return file.getvalue()


def tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("inner.txt")
        info.size = len(TEXT.encode())
        archive.addfile(info, io.BytesIO(TEXT.encode()))
    return file.getvalue()


def sentencepiece_bytes() -> bytes:
    model = io.BytesIO()
    lines = iter(TEXT.splitlines())
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines, model_writer=model, vocab_size=20, hard_vocab_limit=False, minloglevel=2
    )
    return model.getvalue()


NO_TEXT = {
    "a zip archive": zip_bytes(), "a tar archive": tar_bytes(), "a Parquet file": parquet_bytes("x"),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(40), "a PDF file": b"%PDF-1.7\n%\xe2\xe3",
    "an SQLite database": b"SQLite format 3\0" + bytes(90), "compressed twice": gzip.compress(gzip.compress(b"x" * 99)),
    "an lzma file": lzma.compress(TEXT.encode(), lzma.FORMAT_ALONE), "a zlib file": zlib.compress(TEXT.encode()),
    "an Office document": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90),
    "a SentencePiece model": sentencepiece_bytes(),
    "a program": pathlib.Path(sys.executable).read_bytes()[:9000],
}  # fmt: skip


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_binary_files_are_left_out_of_a_folder_of_texts_whatever_their_names(tmp_path, compress, capsys):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/good.txt").write_text(TEXT)
    for number, content in enumerate(NO_TEXT.values()):
        (tmp_path / f"corpus/{number}.txt").write_bytes(compress(content))
    data = DataSettings(source=str(tmp_path / "corpus"), validation_share=0.0, test_share=0.0)
    store = make_store(tmp_path / "store", lambda: documents(data), ByteVocab(), data)
    assert store.meta["splits"]["train"]["n_documents"] == 1
    assert store.meta["splits"]["train"]["n_bytes"] == len(TEXT.encode())
    said = capsys.readouterr().err
    for number, kind in enumerate(NO_TEXT):
        assert f"leaves out 1 ({kind}, and not text): {number}.txt" in said


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_a_single_binary_file_is_refused(tmp_path, kind, name):
    (tmp_path / name).write_bytes(NO_TEXT[kind])
    if kind == "a Parquet file":
        assert texts(tmp_path / name) == ["x"]
    else:
        with pytest.raises(UserError, match=rf"config.data.format=auto: .*{name} is (compressed|{kind}), and not text"):
            texts(tmp_path / name)
    for format in ("lines", "jsonl"):
        with pytest.raises(UserError, match=rf"config.data.source=.*{name}: is {kind}, and not "):
            texts(tmp_path / name, format=format)


def test_texts_that_only_begin_like_binary_files_are_texts(tmp_path):
    for number, text in enumerate(
        ("BZh9 is a code", "PK is short", "%PDF is a name", "ID3 tags", "GIF8", "MZ", "PAR1", "II*")
    ):
        (tmp_path / f"{number}.txt").write_text(text)
    assert len([text for text in texts(tmp_path) if text]) == 8


def test_a_big_compressed_text_lies_on_disk_and_has_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(document_module, "BIG_FILE", 1000)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    (document,) = documents(DataSettings(source=str(tmp_path), holdout="hash"))
    assert isinstance(document.text, memoryview)
    assert bytes(document.text).decode() == TEXT
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config.data.source=.*a.txt.xz: holds over .*set TMPDIR to a folder"):
        texts(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # as a disk that is full
    try:
        with pytest.raises(UserError, match=r"can't be decompressed into .*; set TMPDIR"):
            texts(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


MEMORY = """
import re, sys
from tvq_pod.config.settings import DataSettings
from tvq_pod.data.corpora import documents
n = sum(len(document.text) for document in documents(DataSettings(source=sys.argv[1], format=sys.argv[2])))
print(n, re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["text", "lines"])
def test_memory_does_not_grow_with_what_is_in_a_compressed_file(tmp_path, format):
    found = []
    for megabytes in (1, 600):
        path = tmp_path / f"{megabytes}.txt.gz"
        with gzip.open(path, "wb", 1) as file:
            for _ in range(megabytes):
                file.write((b"x" * 999 + b"\n") * 1000)
        command = [sys.executable, "-c", MEMORY, str(path), format]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        n_bytes, kilobytes = map(int, done.stdout.split())
        assert n_bytes == megabytes * (1_000_000 if format == "text" else 999_000)
        found.append(kilobytes / 1000)
    assert found[1] < found[0] + 150  # BIG_FILE, and the block that it came in


def test_a_compressed_corpus_makes_the_store_that_the_plain_one_makes(tmp_path):
    stores = []
    for number, compress in enumerate((bytes, *COMPRESS.values())):
        (tmp_path / f"{number}").mkdir()
        for name in "abc":
            (tmp_path / f"{number}/{name}").write_bytes(compress((TEXT + name).encode()))
        found = [document.text for document in documents(DataSettings(source=str(tmp_path / f"{number}")))]
        stores.append(store_of(tmp_path / f"store{number}", found).fingerprint)
    assert len(set(stores)) == 1
