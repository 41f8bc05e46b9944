"""The source lines of a compiled program's operations: the link from a trace, which has their names, to the code."""

import pathlib
import re
from collections.abc import Iterator

from tvq_pod.planning.module import Module, source_of

_PACKAGE = pathlib.Path(__file__).parents[1]
_ROOT = f"{_PACKAGE.parent}/"  # paths below it are shown relative to it
_TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)", re.MULTILINE)
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")


def operations(program: str) -> str:
    """Lists the operations of a compiled program's text, a line each: the name, as in a trace; pass and path, as in the
    plan; and the innermost line of tvq_pod that it comes from, FILE:LINE in FUNCTION, or of another package if there is
    none. Columns are separated by tabs. Raises ValueError for a text that is not a program."""
    module, frames = Module(program), _Frames(program)
    fused = {i.called("calls") for body in module.computations() for i in body if i.opcode == "fusion"}
    rows = ["operation\tpath\tline"]
    for name, body in module.named_computations():
        if name in fused:
            continue
        for instruction in body:
            found = _FRAME.search(instruction.rest)
            if instruction.opcode in ("parameter", "constant", "tuple", "get-tuple-element") or not found:
                continue
            rows.append(f"{instruction.name}\t{source_of(instruction)}\t{frames.line(int(found[1]))}")
    return "\n".join(rows) + "\n"


class _Frames:
    """The tables of stack frames at the head of a program."""

    def __init__(self, program: str):
        tables = {name: dict(_numbered(rows)) for name, rows in _TABLE.findall(program)}
        self._files, self._functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})
        self._places, self._frames = tables.get("FileLocations", {}), tables.get("StackFrames", {})

    def line(self, frame: int) -> str:
        """A frame's source line, as FILE:LINE in FUNCTION."""
        lines = list(self._lines(frame))
        own = [line.removeprefix(_ROOT) for line in lines if line.startswith(f"{_PACKAGE}/")]
        return (own or lines or [""])[0]

    def _lines(self, frame: int) -> Iterator[str]:
        """Yields source lines, from the innermost outwards."""
        seen = set()
        while frame in self._frames and frame not in seen:
            seen.add(frame)
            own = _fields(self._frames[frame])
            place = _fields(self._places.get(own.get("file_location_id", 0), ""))
            file, function = (
                table.get(place.get(key, 0), "?").strip('"')
                for table, key in ((self._files, "file_name_id"), (self._functions, "function_name_id"))
            )
            yield f"{file}:{place.get('line', 0)} in {function}"
            frame = own.get("parent_frame_id", 0)


def _numbered(rows: str) -> Iterator[tuple[int, str]]:
    for row in rows.splitlines():
        number, _, rest = row.partition(" ")
        yield int(number), rest


def _fields(row: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\b(\w+)=(\d+)", row)}
