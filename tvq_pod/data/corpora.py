"""Corpora: where documents come from. Each is an iterator of (name, bytes) in a fixed order."""

import json
import pathlib
import sysconfig
from collections.abc import Iterator

from tvq_pod.config import DataSettings
from tvq_pod.errors import UserError

Documents = Iterator[tuple[str, bytes]]


def documents(data: DataSettings) -> Documents:
    """The documents of `data.source`, with a name for messages. Raises UserError if there is no such corpus."""
    kind = data.format if data.format != "auto" else _guess_format(data.source)
    if kind == "stdlib":
        return stdlib()
    path = pathlib.Path(data.source)
    if kind == "folder":
        if not path.is_dir():
            raise UserError(f"config.data.source={data.source}: must be a folder, as config.data.format=folder says")
        try:
            return folder(path, data.glob)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"config.data.glob={data.glob}: is no pattern ({error}); '**/*' takes all files") from None
    if not path.is_file():
        raise UserError(f"config.data.source={data.source}: must be a file, as config.data.format={kind} says")
    return jsonl(path, data.text_field) if kind == "jsonl" else lines(path)


def _guess_format(source: str) -> str:
    if source == "stdlib":
        return "stdlib"
    path = pathlib.Path(source)
    if not source or not path.exists():
        raise UserError(
            f"config.data.source={source}: is not there; must be 'stdlib', a folder of text files, "
            "a file of one document a line, or a .jsonl file"
        )
    if path.is_dir():
        return "folder"
    return "jsonl" if path.suffix == ".jsonl" else "lines"


def stdlib() -> Documents:
    """The source files of this interpreter's standard library: about 1,800 documents, 31 MB."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(name.parts):
            yield str(name), path.read_bytes()


def folder(root: pathlib.Path, glob: str) -> Documents:
    """Each file below `root` that matches `glob` is a document, in the order of their paths."""
    paths = sorted(root.glob(glob))
    return ((str(path.relative_to(root)), path.read_bytes()) for path in paths if path.is_file())


def lines(path: pathlib.Path) -> Documents:
    """Each line of the file is a document; its line end is not part of it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield f"{path.name}:{number}", line.rstrip(b"\r\n")


def jsonl(path: pathlib.Path, text_field: str) -> Documents:
    """Each line is a JSON object whose `text_field` is a document; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except ValueError as error:
                raise UserError(f"config.data.source={path}: line {number} is not JSON ({error})") from None
            except (KeyError, TypeError):
                raise UserError(
                    f"config.data.text_field={text_field}: line {number} of {path} has no such field"
                ) from None
            if not isinstance(text, str):
                raise UserError(f"config.data.text_field={text_field}: line {number} of {path} has no text there")
            # JSON can spell half of a surrogate pair, which UTF-8 can't
            yield f"{path.name}:{number}", text.encode("utf-8", errors="replace")
