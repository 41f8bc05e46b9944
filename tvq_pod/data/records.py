"""Corpora in files of many documents: JSON lines, Parquet and ArrayRecord, plain or compressed. Read as streams, in the
order of their paths.

A row that has no text is bad, whatever the format: config.data.bad_rows says whether it is an error or left out.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.compressed import SNIFFED, compression_of, opened_lines
from tvq_pod.data.document import Document, Documents, content
from tvq_pod.data.sources import File, Listing
from tvq_pod.data.text import numbered_lines
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require

ROWS = 64  # of a Parquet file that are read at a time
SKIP = "or give config.data.bad_rows=skip"


class _BadRow(Exception):
    """why: of what kind, for a count. setting, problem: for an error."""

    def __init__(self, why: str, setting: str, problem: str):
        super().__init__(why)
        self.why, self.setting, self.problem = why, setting, problem


def _bad(bad: _BadRow, name: str, file: File, data: DataSettings) -> Document:
    """A document that is left out. Raises UserError if bad rows are an error."""
    if data.bad_rows == "error":
        remedy = "give the field that has it" if "text_field" in bad.setting else "mend it"
        raise UserError(f"{bad.setting}: {bad.problem}; {remedy}, {SKIP}")
    return Document(name, b"", file.split, problem=bad.why)


# ------------------------------------------------- JSON
def jsonl(listing: Listing, data: DataSettings) -> Documents:
    """Each line is a JSON object whose `config.data.text_field` is a document; blank lines are passed over."""
    for file in listing.files:
        with opened_lines(pathlib.Path(file.path), "JSON lines") as lines:
            for number, line in numbered_lines(lines, file):
                if not line.strip():
                    continue
                yield _json_document(line, f"line {number}", f"{file.name}:{number}", file, data)


def _json_document(row: bytes, where: str, name: str, file: File, data: DataSettings) -> Document:
    try:
        text = _json_text(row, where, pathlib.Path(file.path), data.text_field)
    except _BadRow as bad:
        return _bad(bad, name, file, data)
    return Document(name, text, file.split)


def _json_text(row: bytes, where: str, path: pathlib.Path, field: str) -> bytes:
    """The UTF-8 bytes of an object's field. Raises _BadRow if there is none."""
    here, of_field = f"config.data.source={path}", f"config.data.text_field={field}"
    try:
        value = json.loads(row)
    except UnicodeDecodeError as error:
        raise _BadRow("not UTF-8", here, f"{where} is not UTF-8 ({error.reason}), and so is not JSON") from None
    except ValueError as error:
        raise _BadRow("not JSON", here, f"{where} is not JSON ({error})") from None
    except RecursionError:
        raise _BadRow("nested too deeply", here, f"{where} is nested too deeply") from None
    if isinstance(value, dict) and field in value:
        value = value[field]
    else:
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                problem = f"{where} of {path} has no such field"
                raise _BadRow(f"without the field {field}", of_field, problem)
            value = value[name]
    if not isinstance(value, str):
        why = "null in place of text" if value is None else "another type than text"
        raise _BadRow(why, of_field, f"{where} of {path} has no text there, but {_kind(value)}")
    try:
        return value.encode()
    except UnicodeEncodeError:
        problem = f"{where} has half of a surrogate pair, which is no character"
        raise _BadRow("half of a surrogate pair", here, problem) from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# ------------------------------------------------- Parquet
def parquet(listing: Listing, data: DataSettings) -> Documents:
    """Each row's column `config.data.text_field` is a document."""
    require("pyarrow", f"config.data.source={listing.source}: Parquet")
    for file in listing.files:
        yield from _parquet_rows(file, data)


def _parquet_rows(file: File, data: DataSettings) -> Documents:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    path, field = pathlib.Path(file.path), data.text_field
    of_field, row = f"config.data.text_field={field}", file.n_before
    try:
        with ParquetFile(_as_parquet(path), memory_map=True) as table:
            column = _column(table.schema_arrow, field)
            if column is None:
                there = ", ".join(table.schema_arrow.names)
                missing = _BadRow(f"without the field {field}", of_field, f"{path} has no such column, but {there}")
                for row in _rows(table, file):
                    yield _bad(missing, f"{file.name}:{row}", file, data)
                return
            kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
            if not _is_text(kind):
                problem = f"{path} has {column.type} there, and no text"
                other = _BadRow("another type than text", of_field, problem)
                for row in _rows(table, file):
                    yield _bad(other, f"{file.name}:{row}", file, data)
                return
            nested = [] if field in table.schema_arrow.names else field.split(".")[1:]
            for batch in _batches(table, field, file):
                for text in _texts(batch.column(0), nested):
                    row += 1
                    name = f"{file.name}:{row}"
                    if text is None:
                        null = _BadRow("null in place of text", of_field, f"row {row} of {path} has no text there")
                        yield _bad(null, name, file, data)
                    else:
                        yield Document(name, text, file.split, is_row=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"config.data.source={path}: can't be read, or is damaged ({' '.join(str(error).split())[:200]})"
        ) from None


def _rows(table, file: File) -> range:
    """The numbers of the rows that are read, from 1."""
    groups = range(file.begin, table.num_row_groups if file.end is None else file.end)
    n_rows = sum(table.metadata.row_group(group).num_rows for group in groups)
    return range(file.n_before + 1, file.n_before + n_rows + 1)


def _batches(table, field: str, file: File) -> Iterator:
    """A column, ROWS rows at a time; row group by row group, since pyarrow can't read all nested types across them."""
    for group in range(file.begin, table.num_row_groups if file.end is None else file.end):
        yield from table.iter_batches(ROWS, row_groups=[group], columns=[field])


def _as_parquet(path: pathlib.Path):
    """What pyarrow reads: the path, or what is in a compressed file."""
    import pyarrow

    with path.open("rb") as file:
        is_compressed = compression_of(file.read(SNIFFED))
    return pyarrow.BufferReader(content(path)) if is_compressed else path


def _column(schema, field: str):
    """A column's field in the schema, also one in a struct; None if there is none."""
    import pyarrow

    if field in schema.names:
        return schema.field(field)
    first, *more = field.split(".")
    found = schema.field(first) if first in schema.names else None
    for name in more:
        if found is None or not pyarrow.types.is_struct(found.type):
            return None
        found = found.type.field(name) if found.type.get_field_index(name) >= 0 else None
    return found


def _is_text(kind) -> bool:
    from pyarrow import types

    text = (types.is_string, types.is_large_string, types.is_string_view)
    data = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null)
    return any(check(kind) for check in (*text, *data))


def _texts(column, nested: list[str]) -> list[bytes | None]:
    """Of a column, or of a field of its structs, of theirs, and so on."""
    import pyarrow
    from pyarrow import compute

    if nested:
        column = compute.struct_field(column, nested)  # pyright: ignore[reportAttributeAccessIssue]
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()


# ------------------------------------------------- ArrayRecord
def arrayrecord(listing: Listing, data: DataSettings) -> Documents:
    """Each record is a document; or, in a file whose first record is a JSON object, the `config.data.text_field` of it.
    With an empty config.data.text_field, records are documents whatever they are."""
    require("array_record", f"config.data.source={listing.source}: ArrayRecord")
    for file in listing.files:
        path, has_json = pathlib.Path(file.path), False
        for number, record in enumerate(_records(path), 1):
            name = f"{file.name}:{number}"
            if number == 1:
                has_json = bool(data.text_field) and _is_object(record)
            if has_json:
                yield _json_document(record, f"record {number}", name, file, data)
            else:
                yield Document(name, record, file.split, is_row=True)


def _is_object(record: bytes) -> bool:
    try:
        return record[:1] == b"{" and isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False


def _records(path: pathlib.Path) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    with _damage_of_records(path), contextlib.ExitStack() as files:
        with path.open("rb") as file:
            is_compressed = compression_of(file.read(SNIFFED))
        plain = path
        if is_compressed:
            copy = files.enter_context(tempfile.NamedTemporaryFile())
            copy.write(content(path))
            copy.flush()
            plain = pathlib.Path(copy.name)
        reader = ArrayRecordReader(str(plain))
        files.callback(reader.close)  # raises what was wrong
        for _ in range(reader.num_records()):
            yield reader.read()


@contextlib.contextmanager
def _damage_of_records(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"config.data.source={path}: can't be read, or is damaged ({' '.join(str(error).split())[:200]})"
        ) from None
