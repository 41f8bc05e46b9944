"""The paper's three data sets, as published; each defines its own held-out documents.

enwik8 (mattmahoney.net/dc/textdata): one file, 100,000,000 bytes of Wikipedia; 90 / 5 / 5 million bytes.
PG-19 (github.com/google-deepmind/pg19): folders train, validation and test, a file per book, and metadata.csv.
ImageNet64 (Chrabaszcz and others, arXiv 1707.08819): npz files of 64 x 64 images, a row of 12,288 bytes each: all red
values, row by row, all green, all blue. A document is an image, pixel by pixel: red, green, blue.
"""

import contextlib
import csv
import pathlib
import zipfile
import zlib
from typing import IO

import numpy as np

from tvq_pod.config.settings import IMAGE_BYTES
from tvq_pod.data.document import Document, Documents, content
from tvq_pod.errors import UserError

ENWIK8_BYTES = {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}
PG19_BOOKS = {"train": 28_602, "validation": 50, "test": 100}
PG19_WORDS = {"train": 1_973_136_207, "validation": 3_007_061, "test": 6_966_499}  # as its authors count them
TRAIN_FILES = tuple(f"train_data_batch_{n}.npz" for n in range(1, 11))
TEST_FILE = "val_data.npz"  # the official validation images
TRAIN_IMAGES = 1_200_000  # the rest of TRAIN_FILES is for validation
IMAGES = {"train": 1_281_167, "test": 50_000}
IMAGES_AT_ONCE = 1024
ENCRYPTED = 1  # bit of a zip's entry
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError)


def enwik8(path: pathlib.Path) -> Documents:
    """Yields one document per split. Raises UserError if the file, or the content of the zip, is not enwik8."""
    here = f"config.data.source={path}"
    whole = content(path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive, _member(archive, "enwik8", path) as member:
                whole = member.read()
        except BAD_ZIP as error:
            raise UserError(f"{here}: the zip is damaged ({error}); download it again") from None
    if len(whole) != sum(ENWIK8_BYTES.values()):
        raise UserError(
            f"{here}: has {len(whole):,} bytes, but enwik8 has {sum(ENWIK8_BYTES.values()):,}; download it again, or "
            "give config.data.format=lines or folder for another text"
        )
    at = 0
    for split, n_bytes in ENWIK8_BYTES.items():
        yield Document(f"{path.name}, {split}", whole[at : at + n_bytes], split)
        at += n_bytes


def _member(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> IO[bytes]:
    """Opens a file in a zip. Raises UserError if it does not exist, is encrypted, or has an unknown compression."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise UserError(f"config.data.source: {path} does not contain {name}") from None
    if info.flag_bits & ENCRYPTED:
        raise UserError(f"config.data.source: {path} is encrypted; give one that is not")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"config.data.source: {path} is compressed by method {info.compress_type}; compress it with deflate"
        )
    return archive.open(info)


def pg19(root: pathlib.Path) -> Documents:
    """Yields one document per book. Raises UserError if a folder, metadata.csv or a book listed there is missing."""
    here = f"config.data.source={root}"
    listed = _pg19_listed(root)
    for split in PG19_BOOKS:
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"{here}: has no folder {split}; PG-19 has train, validation, test and metadata.csv")
        books = sorted(folder.glob("*.txt"))
        for book in books:
            if book.stem not in listed:
                raise UserError(f"{here}: {book} is not in metadata.csv; remove it if it is from another data set")
        listed -= {book.stem for book in books}
    if listed:
        some = ", ".join(sorted(listed)[:3])
        raise UserError(f"{here}: {len(listed)} books of metadata.csv are missing ({some}); download them")
    return (Document(f"{split}/{book.name}", content(book), split)
            for split in PG19_BOOKS for book in sorted((root / split).glob("*.txt")))  # fmt: skip


def _pg19_listed(root: pathlib.Path) -> set[str]:
    path = root / "metadata.csv"
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            listed = {row[0] for row in csv.reader(file) if row}
    except OSError as error:
        raise UserError(f"config.data.source={root}: metadata.csv can't be read ({error.strerror})") from None
    except csv.Error as error:
        raise UserError(f"config.data.source={root}: metadata.csv is damaged ({error})") from None
    return {name for name in listed if name.isdecimal()}  # a first line may have the columns' names


def pg19_words(split: str, n_books: int, counted: int) -> int:
    """Returns the number of words of a split, for word-level perplexity: the authors' own count if no book is
    missing."""
    return PG19_WORDS[split] if n_books == PG19_BOOKS[split] else counted


def imagenet64(root: pathlib.Path) -> Documents:
    """Yields one document per image. Raises UserError if a file is missing, damaged, or not of 64 x 64 images."""
    found = {path.name: path for path in ([root] if root.is_file() else sorted(root.rglob("*.npz")))}
    missing = [name for name in (*TRAIN_FILES, TEST_FILE) if name not in found]
    if missing:
        raise UserError(f"config.data.source={root}: lacks {', '.join(missing)} of ImageNet64 (npz); download them")
    counts = {path: _n_images(path) for path in (found[name] for name in (*TRAIN_FILES, TEST_FILE))}
    for split, names in (("train", TRAIN_FILES), ("test", (TEST_FILE,))):
        n_images = sum(counts[found[name]] for name in names)
        if n_images != IMAGES[split]:
            raise UserError(
                f"config.data.source={root}: the {split} files ({names[0]}, ...) have {n_images:,} images, but those "
                f"of ImageNet64 have {IMAGES[split]:,}; download them again"
            )
    return _images(found)


def _images(found: dict[str, pathlib.Path]) -> Documents:
    n_seen = 0
    for name in (*TRAIN_FILES, TEST_FILE):
        for image in _rows(found[name]):
            n_seen += 1
            split = "test" if name == TEST_FILE else "train" if n_seen <= TRAIN_IMAGES else "validation"
            yield Document(f"{name}:{n_seen}", image.reshape(3, 64, 64).transpose(1, 2, 0).tobytes(), split)


def _n_images(path: pathlib.Path) -> int:
    with _Images(path) as images:
        return images.shape[0]


def _rows(path: pathlib.Path):
    """Yields the rows of `data`, uint8 [12288]; a few are read at a time, since a file takes 1.6 GB."""
    with _Images(path) as images:
        for begin in range(0, images.shape[0], IMAGES_AT_ONCE):
            yield from images.read(min(IMAGES_AT_ONCE, images.shape[0] - begin))


@contextlib.contextmanager
def _damage_named(path: pathlib.Path):
    try:
        yield
    except (OSError, ValueError, *BAD_ZIP) as error:
        raise UserError(f"config.data.source: {path} is damaged, or not a file of ImageNet64 ({error})") from None


class _Images:
    """`data` of an npz file, read from its beginning to its end. Raises UserError for a wrong shape, or damage."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        with _damage_named(self._path):
            self._archive = zipfile.ZipFile(path)
            self._file = _member(self._archive, "data.npy", path)
            major, _ = np.lib.format.read_magic(self._file)
            read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            self.shape, is_fortran, dtype = read_header(self._file)
            if len(self.shape) != 2 or self.shape[1] != IMAGE_BYTES or dtype != np.uint8 or is_fortran:
                order = " in Fortran order" if is_fortran else ""
                raise ValueError(
                    f"data is {dtype} {list(self.shape)}{order}, but must be uint8 [images, {IMAGE_BYTES}]"
                )

    def read(self, n: int) -> np.ndarray:
        """Returns the next n images, uint8 [n, 12288]."""
        with _damage_named(self._path):
            read = self._file.read(n * IMAGE_BYTES)
            if len(read) < n * IMAGE_BYTES:
                raise ValueError("data ends too early")
            return np.frombuffer(read, np.uint8).reshape(n, IMAGE_BYTES)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._archive.close()
