"""The bundles that the compiler scheduled for each operation: makes it dump them, and finds those of an operation.

libtpu reads its flags once, when it is loaded. So the flags must be set before that, and hold for the process.
"""

import atexit
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress

from tvq_pod.errors import UserError
from tvq_pod.planning.bundles import Count, count_bundles
from tvq_pod.planning.module import Instruction, Module

_FLAGS = "LIBTPU_INIT_ARGS"
_DUMP = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")
_NO_PROGRAM = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional")
_ATTRIBUTES = re.compile(
    r"\b(?:kind|dimensions|slice|dynamic_slice_sizes|window|dim_labels|\w+_contracting_dims|\w+_batch_dims|padding|"
    r"direction|custom_call_target|feature_group_count|batch_group_count|iota_dimension|index)=(?:\{[^}]*\}|[^\s,]+)"
)
_KERNEL = re.compile(r'"body":"[^"]*"')


_PREFIX = "tvq_pod_schedules_"


def _remove_abandoned() -> None:
    """Removes the folders of processes that were killed."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("_")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, ValueError):
            pass  # another user's, or not the folder of a process


class Dumps:
    """A temporary folder that libtpu writes schedules to. It is deleted when the process ends."""

    def __init__(self):
        self._folder: pathlib.Path | None = None

    @contextmanager
    def asked_for(self) -> Iterator[None]:
        """Sets the flags within a block, in which libtpu must be loaded to make it dump; a second call changes
        nothing."""
        if self._folder is not None:
            yield
            return
        _remove_abandoned()
        try:
            self._folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}_"))
        except OSError as error:
            raise UserError(
                f"TMPDIR={os.environ.get('TMPDIR', '')}: has no room for a temporary folder ({error})"
            ) from None
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        before = os.environ.get(_FLAGS)
        ours = f"--xla_jf_dump_to={self._folder} --xla_jf_dump_llo_text=true"
        os.environ[_FLAGS] = f"{before or ''} {ours} --xla_jf_dump_llo_pass_label_regex=^final_bundles$".strip()
        try:
            yield
        finally:  # child processes must not use the folder
            if before is None:
                del os.environ[_FLAGS]
            else:
                os.environ[_FLAGS] = before

    def discard(self) -> None:
        """Deletes what has been dumped."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[pathlib.Path]:
        return [path for path in self._folder.glob("*") if path.is_file()] if self._folder else []

    def take(self, wanted: Container[str]) -> dict[str, Count]:
        """The counts of the operations with these names, from the dumps since the last discard; deletes all dumps.
        Empty if libtpu was loaded before its flags were set. A schedule that can't be read is left out."""
        counts = {}
        for path in self._files():
            named = _DUMP.match(path.name)
            if named and named[1] in wanted:
                with suppress(ValueError):
                    counts[named[1]] = count_bundles(path.read_text(errors="replace"))
            path.unlink(missing_ok=True)
        return counts


class Schedules:
    """The counts of a program's operations. The compiler compiles equal operations once, and dumps their schedule with
    the name of one of them."""

    def __init__(self, module: Module, counts: Mapping[str, Count]):
        self._module = module
        self._counts = counts
        self._computations: dict[str, str] = {}  # texts with numbered instructions
        self._equal = {
            self._signature(instruction): counts[instruction.name]
            for body in module.computations()
            for instruction in body
            if instruction.name in counts
        }

    def count(self, instruction: Instruction) -> Count | None:
        """The count of an operation; None if it is unknown."""
        if not self._counts or instruction.opcode in _NO_PROGRAM:
            return None
        return self._counts.get(instruction.name) or self._equal.get(self._signature(instruction))

    def _signature(self, instruction: Instruction) -> str:
        """A text that is equal for operations that compile to the same bundles."""
        types = " ".join(self._module.operand_types(instruction))
        return f"{instruction.opcode} {instruction.type} {types} {self._decides(instruction)}"

    def _decides(self, instruction: Instruction) -> str:
        """The parts of an operation that determine its program, except for the types."""
        attributes = instruction.attributes
        callee = instruction.called("calls")
        inside = self._numbered(callee) if callee and callee in self._module else ""
        return " ".join([*_ATTRIBUTES.findall(attributes), *_KERNEL.findall(attributes), inside])

    def _numbered(self, computation: str) -> str:
        """A computation's text, with numbers instead of names for its instructions."""
        if computation not in self._computations:
            body = self._module.body(computation)
            numbers = {instruction.name: f"%{n}" for n, instruction in enumerate(body)}
            lines = []
            for i in body:
                operands = ",".join(numbers.get(name, name) for name in i.operands) or i.argument
                lines.append(f"{i.type} {i.opcode}({operands}) {self._decides(i)}")
            self._computations[computation] = "; ".join(lines)
        return self._computations[computation]
