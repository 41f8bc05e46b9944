"""Corpora in files of many documents: JSON lines, Parquet and ArrayRecord, plain or compressed. They are read as
streams, in the order of their paths.

A row without text is bad in every format: config.data.bad_rows says whether it is an error or left out.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator

from tvq_pod.config.settings import DataSettings
from tvq_pod.data import hub
from tvq_pod.data.bucket import Object, Place, read_ahead
from tvq_pod.data.compressed import SNIFFED, compression_of, opened_lines
from tvq_pod.data.document import Document, Documents, content
from tvq_pod.data.kinds import check_json_lines
from tvq_pod.data.sources import File, Listing
from tvq_pod.data.text import numbered_lines
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require

ROWS = 64  # read from a Parquet file at a time
SKIP = "or give config.data.bad_rows=skip"


class _BadRow(Exception):
    """A row without text. why: the kind of problem, for counts. setting, problem: for an error."""

    def __init__(self, why: str, setting: str, problem: str):
        super().__init__(why)
        self.why, self.setting, self.problem = why, setting, problem


def _bad(bad: _BadRow, name: str, file: File, data: DataSettings) -> Document:
    """Returns a document that is left out. Raises UserError if bad rows are an error."""
    if data.bad_rows == "error":
        remedy = "give the field that has it" if "text_field" in bad.setting else "fix it"
        raise UserError(f"{bad.setting}: {bad.problem}; {remedy}, {SKIP}")
    return Document(name, b"", file.split, problem=bad.why)


# ------------------------------------------------- JSON
def jsonl(listing: Listing, data: DataSettings) -> Documents:
    """Yields the `config.data.text_field` of each line, a JSON object, as a document; blank lines are skipped."""
    for file in read_ahead(listing.files):
        if file.object and file.kind == "json":  # the listing has only checked the first ones
            check_json_lines(file.at)
        with opened_lines(file.at, "JSON lines") as opened:
            for first, lines in numbered_lines(opened, file):
                for number, line in enumerate(lines, first):
                    if line.strip():
                        yield _json_document(line, f"line {number}", f"{file.name}:{number}", file, data)


def _json_document(row: bytes, where: str, name: str, file: File, data: DataSettings) -> Document:
    try:
        text = _json_text(row, where, file.path, data.text_field)
    except _BadRow as bad:
        return _bad(bad, name, file, data)
    return Document(name, text, file.split)


def _json_text(row: bytes, where: str, path: str, field: str) -> bytes:
    """Returns the UTF-8 bytes of an object's field. Raises _BadRow if it has no text."""
    here, of_field = f"config.data.source={path}", f"config.data.text_field={field}"
    try:
        value = json.loads(row)
    except UnicodeDecodeError as error:
        raise _BadRow("not UTF-8", here, f"{where} is not UTF-8 ({error.reason}), so it is not JSON") from None
    except ValueError as error:
        raise _BadRow("not JSON", here, f"{where} is not JSON ({error})") from None
    except RecursionError:
        raise _BadRow("nested too deeply", here, f"{where} is nested too deeply") from None
    if isinstance(value, dict) and field in value:
        value = value[field]
    else:
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                problem = f"{where} of {path} does not have this field"
                raise _BadRow(f"without the field {field}", of_field, problem)
            value = value[name]
    if not isinstance(value, str):
        why = "null instead of text" if value is None else "not text"
        raise _BadRow(why, of_field, f"{where} of {path} has {_kind(value)} there instead of text")
    try:
        return value.encode()
    except UnicodeEncodeError:
        problem = f"{where} has half of a surrogate pair, which is not a character"
        raise _BadRow("half of a surrogate pair", here, problem) from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# ------------------------------------------------- Parquet
def parquet(listing: Listing, data: DataSettings) -> Documents:
    """Yields the column `config.data.text_field` of each row as a document."""
    require("pyarrow", f"config.data.source={listing.source}: Parquet")
    for file in read_ahead(listing.files):
        yield from _parquet_rows(file, data)


def _parquet_rows(file: File, data: DataSettings) -> Documents:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    path, field, row = file.at, data.text_field, file.n_before
    try:
        with ParquetFile(as_parquet(path), memory_map=True) as table:
            if bad := _without_text(table.schema_arrow, field, file.path):
                for row in _rows(table, file):
                    yield _bad(bad, f"{file.name}:{row}", file, data)
                return
            for batch in _batches(table, field, file):
                yield from _of_batch(batch, row, file, data)
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"config.data.source={path}: can't be read, or is damaged ({' '.join(str(error).split())[:200]})"
        ) from None


def _rows(table, file: File) -> range:
    """Returns the numbers of the rows that are read, from 1."""
    groups = range(file.begin, table.num_row_groups if file.end is None else file.end)
    n_rows = sum(table.metadata.row_group(group).num_rows for group in groups)
    return range(file.n_before + 1, file.n_before + n_rows + 1)


def _batches(table, field: str, file: File) -> Iterator:
    """Yields a column, ROWS rows at a time, by row group, since pyarrow can't read all nested types across groups."""
    for group in range(file.begin, table.num_row_groups if file.end is None else file.end):
        yield from table.iter_batches(ROWS, row_groups=[group], columns=[field])


def as_parquet(path: Place):
    """Returns what pyarrow can read: the path, or the content of a compressed file."""
    import pyarrow

    with path.open("rb") as file:
        is_compressed = compression_of(file.read(SNIFFED))
    if is_compressed:
        return pyarrow.BufferReader(content(path))
    return path.open(in_order=False) if isinstance(path, Object) else path


def _without_text(schema, field: str, path: str) -> _BadRow | None:
    """Returns why no row of this schema has text in the field; None if rows may have text."""
    import pyarrow

    of_field, names = f"config.data.text_field={field}", schema.names
    first, *more = _parts(schema, field)
    found = schema.field(first) if names.count(first) == 1 else None
    for name in more:
        if found is not None:
            kind = found.type
            found = kind.field(name) if pyarrow.types.is_struct(kind) and kind.get_field_index(name) >= 0 else None
    if found is None:
        n = names.count(first)
        what = f"has {n} columns {first}" if n > 1 else f"does not have this column, only {', '.join(names)}"
        return _BadRow(f"without the field {field}", of_field, f"{path} {what}")
    kind = found.type.value_type if pyarrow.types.is_dictionary(found.type) else found.type
    if not _is_text(kind):
        return _BadRow("another type than text", of_field, f"{path} has {found.type} there, and not text")
    return None


def _parts(schema, field: str) -> list[str]:
    """Returns the name of a column, followed by the names of nested struct fields."""
    return [field] if field in schema.names else field.split(".")


def _of_batch(batch, row: int, file: File, data: DataSettings) -> Documents:
    """Yields a document for each row of a record batch. row: the number of rows before the batch."""
    of_field = f"config.data.text_field={data.text_field}"
    column, *nested = _parts(batch.schema, data.text_field)
    for number, text in enumerate(_texts(batch.column(column), nested), row + 1):
        name = f"{file.name}:{number}"
        if text is None:
            null = _BadRow("null instead of text", of_field, f"row {number} of {file.path} has null there")
            yield _bad(null, name, file, data)
        else:
            yield Document(name, text, file.split, is_row=True)


def _is_text(kind) -> bool:
    from pyarrow import types

    text = (types.is_string, types.is_large_string, types.is_string_view)
    data = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null)
    return any(check(kind) for check in (*text, *data))


def _texts(column, nested: list[str]) -> list[bytes | None]:
    """Returns the texts of a column, or of a field nested in its structs."""
    import pyarrow
    from pyarrow import compute

    if nested:
        column = compute.struct_field(column, nested)  # pyright: ignore[reportAttributeAccessIssue]
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()


# ------------------------------------------------- Hugging Face datasets
def of_hub(file: File, data: DataSettings) -> Documents:
    """Yields the column `config.data.text_field` of each row as a document, as `parquet` does."""
    row = 0
    for batch in hub.batches(hub.parse(file.path)):
        if bad := _without_text(batch.schema, data.text_field, file.path):
            yield from (_bad(bad, f"{file.name}:{row + n}", file, data) for n in range(1, batch.num_rows + 1))
        else:
            yield from _of_batch(batch, row, file, data)
        row += batch.num_rows


# ------------------------------------------------- ArrayRecord
def arrayrecord(listing: Listing, data: DataSettings) -> Documents:
    """Yields each record as a document; in a file whose first record is a JSON object, the `config.data.text_field` of
    each. With an empty config.data.text_field, records are always documents as they are."""
    require("array_record", f"config.data.source={listing.source}: ArrayRecord")
    for file in read_ahead(listing.files):
        path, has_json = file.at, False
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


def _records(path: Place) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    with _damage_of_records(path), contextlib.ExitStack() as files:
        with path.open("rb") as file:
            is_compressed = compression_of(file.read(SNIFFED))
        plain = path
        if is_compressed or isinstance(path, Object):  # the library can't read these
            copy = files.enter_context(tempfile.NamedTemporaryFile())
            copy.write(content(path))
            copy.flush()
            plain = pathlib.Path(copy.name)
        reader = ArrayRecordReader(str(plain))
        files.callback(reader.close)  # raises the reader's error
        for _ in range(reader.num_records()):
            yield reader.read()


@contextlib.contextmanager
def _damage_of_records(path: Place) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"config.data.source={path}: can't be read, or is damaged ({' '.join(str(error).split())[:200]})"
        ) from None
