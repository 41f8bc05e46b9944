"""The paper's three data sets, in small, of exactly the form in which they are given out."""

import io
import os
import zipfile

import numpy as np
import pytest

from tvq_pod.config.settings import DataSettings
from tvq_pod.data import papers
from tvq_pod.data.corpora import documents
from tvq_pod.errors import UserError


def found(source, kind):
    return [(document.split, bytes(document.text)) for document in documents(DataSettings(str(source), kind))]


# ------------------------------------------------- enwik8
@pytest.fixture
def enwik8(monkeypatch, tmp_path):
    monkeypatch.setattr(papers, "ENWIK8_BYTES", dict(train=900, validation=50, test=50))
    text = np.random.default_rng(0).bytes(1000)
    (tmp_path / "enwik8").write_bytes(text)
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "enwik8", "enwik8")
    return text


@pytest.mark.parametrize("name", ["enwik8", "enwik8.zip"])
def test_enwik8_is_cut_as_in_the_literature(enwik8, tmp_path, name):
    assert found(tmp_path / name, "enwik8") == [
        ("train", enwik8[:900]), ("validation", enwik8[900:950]), ("test", enwik8[950:]),
    ]  # fmt: skip


def test_a_file_of_the_real_size_is_cut_in_90_5_and_5_million(tmp_path):
    (tmp_path / "enwik8").touch()
    os.truncate(tmp_path / "enwik8", 100_000_000)  # takes no room
    cut = [(d.split, len(d.text)) for d in documents(DataSettings(str(tmp_path / "enwik8"), "enwik8"))]
    assert cut == [("train", 90_000_000), ("validation", 5_000_000), ("test", 5_000_000)]


@pytest.mark.parametrize(("offset", "value", "message"), [
    (0, 1, "is encrypted; give one that is not"), (2, 99, "is compressed by method 99"),
])  # fmt: skip
def test_a_zip_that_can_not_be_read_is_not_called_damaged(enwik8, tmp_path, offset, value, message):
    content = bytearray((tmp_path / "enwik8.zip").read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # of the file's own header, and of the directory's
        content[content.index(signature) + flags + offset] = value
    (tmp_path / "other.zip").write_bytes(content)
    with pytest.raises(UserError, match=message):
        found(tmp_path / "other.zip", "enwik8")


def test_an_enwik8_that_is_none_is_named(enwik8, tmp_path):
    (tmp_path / "short").write_bytes(enwik8[:-1])
    with pytest.raises(UserError, match=r"short: has 999 bytes, but enwik8 has 1,000; download it again"):
        found(tmp_path / "short", "enwik8")
    content = bytearray((tmp_path / "enwik8.zip").read_bytes())
    content[300] ^= 1
    (tmp_path / "flipped.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped.zip: the zip is damaged"):
        found(tmp_path / "flipped.zip", "enwik8")
    (tmp_path / "cut.zip").write_bytes(content[:600])
    with pytest.raises(UserError, match=r"cut.zip: has 600 bytes"):
        found(tmp_path / "cut.zip", "enwik8")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("enwik9", b"")
    with pytest.raises(UserError, match=r"other.zip does not contain enwik8"):
        found(tmp_path / "other.zip", "enwik8")
    with pytest.raises(UserError, match=r"must be a file, as config.data.format=enwik8 says"):
        found(tmp_path, "enwik8")


# ------------------------------------------------- PG-19
BOOKS = {"train": ["10", "2", "33"], "validation": ["4"], "test": ["5", "61"]}


@pytest.fixture
def pg19(tmp_path):
    rows = []
    for split, names in BOOKS.items():
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / f"{name}.txt").write_text(f"The book {name}.\r\n\r\nIts text, “é”.\n", newline="")
            rows.append(f'{name},"A title, with a comma",1890,http://www.gutenberg.org/ebooks/{name}')
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_each_book_of_pg19_is_a_document_of_its_split(pg19):
    expected = [
        (split, f"The book {name}.\r\n\r\nIts text, “é”.\n".encode())
        for split, names in BOOKS.items()
        for name in sorted(names)
    ]
    assert found(pg19, "pg19") == expected


def test_a_pg19_that_is_not_whole_is_named(pg19):
    (pg19 / "test/61.txt").unlink()
    with pytest.raises(UserError, match=r"1 books of metadata.csv are missing \(61\)"):
        found(pg19, "pg19")
    (pg19 / "test/7.txt").write_text("a stranger")
    with pytest.raises(UserError, match=r"test/7.txt is not in metadata.csv"):
        found(pg19, "pg19")
    (pg19 / "validation/4.txt").rename(pg19 / "train/4.txt")
    (pg19 / "validation").rmdir()
    with pytest.raises(UserError, match=r"has no folder validation"):
        found(pg19, "pg19")
    (pg19 / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"metadata.csv can't be read"):
        found(pg19, "pg19")


def test_words_are_those_that_the_authors_count_where_all_books_are_there():
    assert papers.pg19_words("test", 100, 5) == 6_966_499
    assert papers.pg19_words("validation", 50, 5) == 3_007_061
    assert papers.pg19_words("test", 99, 5) == 5


# ------------------------------------------------- ImageNet64
@pytest.fixture
def imagenet64(monkeypatch, tmp_path):
    """10 files of 3 images, and 4 of the official validation; the first 20 are for training."""
    monkeypatch.setattr(papers, "TRAIN_IMAGES", 20)
    monkeypatch.setattr(papers, "IMAGES", dict(train=30, test=4))
    monkeypatch.setattr(papers, "IMAGES_AT_ONCE", 2)
    rng, planes = np.random.default_rng(0), []
    for n, name in [*((3, f"part{1 + i // 5}/train_data_batch_{i + 1}.npz") for i in range(10)), (4, "val_data.npz")]:
        data = rng.integers(0, 256, size=[n, 3 * 64 * 64], dtype=np.uint8)
        write_npz(tmp_path / name, data)
        planes.append(data)
    return np.concatenate(planes)


def write_npz(path, data):
    path.parent.mkdir(exist_ok=True)
    extra = {} if "val" in path.name else dict(mean=np.zeros(12288))
    np.savez_compressed(path, labels=np.arange(1, len(data) + 1), data=data, **extra)


def test_an_image_is_its_pixels_one_after_the_other(imagenet64, tmp_path):
    seen = found(tmp_path, "imagenet64")
    assert [split for split, _ in seen] == ["train"] * 20 + ["validation"] * 10 + ["test"] * 4
    for (_, text), planes in zip(seen, imagenet64, strict=True):
        red, green, blue = planes[:4096], planes[4096:8192], planes[8192:]
        for place in (0, 1, 64, 4095):  # row by row
            assert text[3 * place : 3 * place + 3] == bytes([red[place], green[place], blue[place]])
        assert len(text) == 12_288


def test_as_many_images_must_be_there_as_were_published(imagenet64, tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"have 30 images, but those of ImageNet64 have 1,281,167"):
        found(tmp_path, "imagenet64")


def test_an_imagenet64_that_is_not_whole_is_named(imagenet64, tmp_path):
    (tmp_path / "part1/train_data_batch_2.npz").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"train_data_batch_2.npz of ImageNet64 \(npz\); download"):
        found(tmp_path, "imagenet64")
    path = tmp_path / "part1/train_data_batch_2.npz"
    for data, message in (
        (np.zeros([3, 3072], np.uint8), r"data is uint8 \[3, 3072\], but must be uint8 \[images, 12288\]"),
        (np.zeros([3, 12288], np.float32), r"data is float32 \[3, 12288\]"),
        (np.zeros([12288], np.uint8), r"data is uint8 \[12288\]"),
        (np.zeros([4, 12288], np.uint8), r"have 31 images, but those of ImageNet64 have 30"),
    ):
        write_npz(path, data)
        with pytest.raises(UserError, match=message):
            found(tmp_path, "imagenet64")
    np.savez_compressed(path, labels=np.arange(3))
    with pytest.raises(UserError, match=r"train_data_batch_2.npz does not contain data.npy"):
        found(tmp_path, "imagenet64")
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"train_data_batch_2.npz is damaged"):
        found(tmp_path, "imagenet64")


def test_damage_in_the_middle_of_a_file_is_named_when_it_is_read(imagenet64, tmp_path):
    path = tmp_path / "part2/train_data_batch_7.npz"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        begin = archive.getinfo("data.npy").header_offset
    content[begin + 9000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train_data_batch_7.npz is damaged"):
        found(tmp_path, "imagenet64")
