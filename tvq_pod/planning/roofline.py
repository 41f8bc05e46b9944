"""How long a step takes at least, operation by operation: a second opinion beside the compiler's estimate.

An operation takes as long as the slowest of three: its scheduled bundles at one a cycle, the bytes that it moves to and
from HBM at 85% of the bandwidth, and its matmuls at 95% of the peak. The step takes the sum. What that leaves out: the
launch of an operation, the latency of a transfer, bundles that wait for something else than HBM, and the time that
chips wait for each other.

Transfers between HBM and VMEM that run beside other operations (copy-start, slice-start and their ends) cost what does
not fit beside them: the operations between start and end leave the HBM idle for a part of their time, which is filled
first; what is left of the transfer is the end's own time.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable

from tvq_pod.planning.arrays import arrays, top_level
from tvq_pod.planning.hlo import COST, Instruction, Peak, Program, branches, is_collective, is_kernel, source_of

HBM_SHARE = 0.85  # of the bandwidth
MATMUL_SHARE = 0.95  # of the peak
_STARTS, _ENDS = ("copy-start", "slice-start"), ("copy-done", "slice-done")
_RENAMES = ("bitcast", "reshape")
_SLICES = ("slice", "dynamic-slice")
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "call", "conditional", "iota"),
)
_WINDOW = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)")


@dataclasses.dataclass(frozen=True)
class Work:
    """What an operation does. bundles: None if they are not known."""

    bundles: int | None
    hbm_bytes: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Timed:
    """An operation, how often it runs, and for one run its work, its cycles and what bounds it."""

    instruction: Instruction
    times: int
    work: Work
    cycles: float
    hbm_cycles: float  # in which it keeps the HBM busy
    bound: str  # "bundles", "HBM" or "matmuls"


class Roofline:
    """The roofline of a scheduled program on a device with that peak."""

    def __init__(self, program: Program, peak: Peak):
        self._program = program
        self._peak = peak
        self.operations: list[Timed] = self._run(program.entry)

    @property
    def cycles(self) -> float:
        """Of one run, on one device."""
        return _total(self.operations)

    @property
    def hbm_bytes(self) -> int:
        """What one run moves to and from the HBM of a device."""
        return sum(operation.times * operation.work.hbm_bytes for operation in self.operations)

    def cycles_by_source(self) -> dict[str, float]:
        """Cycles by pass and source, the dearest first, as `Program.cycles_by_source`."""
        return self._by(lambda operation: source_of(operation.instruction))

    def cycles_by_bound(self) -> dict[str, float]:
        """Cycles of the operations that are bound by bundles, HBM or matmuls."""
        return self._by(lambda operation: operation.bound)

    def _by(self, key: Callable[[Timed], str]) -> dict[str, float]:
        totals: collections.Counter[str] = collections.Counter()
        for operation in self.operations:
            totals[key(operation)] += operation.times * operation.cycles  # pyright: ignore
        return {name: cycles for name, cycles in totals.most_common() if cycles}

    def without_bundles(self) -> dict[str, int]:
        """How often operations run whose bundles are not known, by source: they count as their traffic and matmuls."""
        count: collections.Counter[str] = collections.Counter()
        for operation in self.operations:
            if operation.work.bundles is None and operation.cycles and operation.instruction.opcode not in _ENDS:
                count[source_of(operation.instruction)] += operation.times
        return dict(count.most_common())

    def _run(self, computation: str) -> list[Timed]:
        """The operations of one run of a computation."""
        found: list[Timed] = []
        idle: list[float] = []  # cycles in which an instruction leaves the HBM to others, for each so far
        started: dict[str, int] = {}
        for instruction in self._program.body(computation):
            inner = self._inside(instruction)
            if instruction.opcode in _STARTS:
                started[instruction.name] = len(idle)
            elif instruction.opcode in _ENDS:
                timed = self._timed(instruction)
                left = timed.hbm_cycles
                for place in range(started.get(instruction.operands[0], len(idle)), len(idle)):
                    filled = min(left, idle[place])
                    idle[place] -= filled
                    left -= filled
                inner = [dataclasses.replace(timed, cycles=left)]
            elif not inner:
                inner = [self._timed(instruction)]
            busy = sum(operation.times * operation.hbm_cycles for operation in inner)
            idle.append(max(_total(inner) - busy, 0.0))
            found += inner
        return found

    def _inside(self, instruction: Instruction) -> list[Timed]:
        """The operations that a loop, a call or a conditional runs; of a conditional those of the dearest branch."""
        if instruction.opcode == "while":
            body = instruction.called("body")
            turns = self._program.turns(instruction)
            inner = self._run(body) if body else []
            return [dataclasses.replace(operation, times=turns * operation.times) for operation in inner]
        if instruction.opcode == "call" and (callee := instruction.called("to_apply")):
            return self._run(callee)
        if instruction.opcode == "conditional":
            return max((self._run(branch) for branch in branches(instruction.rest)), key=_total, default=[])
        return []

    def _timed(self, instruction: Instruction) -> Timed:
        work = work_of(self._program, instruction)
        hbm = work.hbm_bytes / (HBM_SHARE * self._peak.hbm_bytes)
        matmuls = work.flops / (MATMUL_SHARE * self._peak.flops)
        cycles, bound = max((hbm, "HBM"), (matmuls, "matmuls"), (float(work.bundles or 0), "bundles"))
        return Timed(instruction, 1, work, cycles, hbm, bound)


def _total(operations: Iterable[Timed]) -> float:
    return sum(operation.times * operation.cycles for operation in operations)


def work_of(program: Program, instruction: Instruction) -> Work:
    """What one instruction does, if it is run once."""
    if instruction.opcode in _FREE or instruction.opcode in _STARTS or is_collective(instruction):
        return Work(0, 0, 0)
    if instruction.opcode == "custom-call":
        return _kernel_work(program, instruction)
    flops = matmul_flops(program, instruction)
    return Work(program.bundles(instruction), _moved(program, instruction), flops)


def _kernel_work(program: Program, instruction: Instruction) -> Work:
    """Of a custom call: what its author says, if he says it. What it has in VMEM already does not travel."""
    results = arrays(instruction.type)
    operands = [array for type_ in program.operand_types(instruction) for array in arrays(type_)]
    found = COST.search(instruction.rest)
    if not found:
        if not is_kernel(instruction):
            return Work(0, 0, 0)
        return Work(program.bundles(instruction), sum(array.hbm_bytes for array in operands + results), 0)
    in_vmem = sum(array.held_bytes for array in operands + results if array.space != 0)
    return Work(program.bundles(instruction), max(int(found[2]) - in_vmem, 0), int(found[1]))


def _moved(program: Program, instruction: Instruction) -> int:
    """Bytes that an instruction moves to and from HBM."""
    results = arrays(instruction.type)
    operands = [arrays(type_) for type_ in program.operand_types(instruction)]
    written = sum(array.hbm_bytes for array in results)
    if instruction.opcode in _ENDS:
        # only its start says where it comes from
        start = program.find(instruction.operands[0])
        source = arrays(start.type)[0 if start.opcode == "slice-start" else 1]
        return sum(array.held_bytes for array in results) * (source.space == 0) + written
    if instruction.opcode == "fusion" and (callee := instruction.called("calls")):
        parameters = {i.rest.partition(")")[0]: i for i in program.body(callee) if i.opcode == "parameter"}
        read = 0
        for place, of_operand in enumerate(operands):
            whole = sum(array.hbm_bytes for array in of_operand)
            if whole and (parameter := parameters.get(str(place))):
                read += min(whole, _read(program, callee, parameter.name, whole))
        return read + min(written, _written(program, callee, top_level(instruction.type)))
    if instruction.opcode in _SLICES:
        reads_hbm = any(array.space == 0 for array in operands[0])
        return sum(array.held_bytes for array in results) * reads_hbm + written
    if instruction.opcode == "dynamic-update-slice":
        update = operands[1]
        is_written = any(array.space == 0 for array in results)
        return sum(array.hbm_bytes + array.held_bytes * is_written for array in update)
    return sum(array.hbm_bytes for of_operand in operands for array in of_operand) + written


def _read(program: Program, computation: str, name: str, whole: int) -> int:
    """Bytes that a fusion reads of an operand in HBM: of what it slices only the slices, of what it updates in place
    nothing."""
    total = 0
    for user in program.users(computation, name):
        places = [n for n, operand in enumerate(user.operands) if operand == name]
        if user.opcode in _RENAMES:
            total += _read(program, computation, user.name, whole)
        elif user.opcode in _SLICES and places == [0]:
            total += sum(array.held_bytes for array in arrays(user.type))
        elif user.opcode == "fusion" and (callee := user.called("calls")):
            inner = {i.rest.partition(")")[0]: i for i in program.body(callee) if i.opcode == "parameter"}
            total += sum(_read(program, callee, inner[str(n)].name, whole) for n in places)
        elif user.opcode == "dynamic-update-slice" and places == [0]:
            continue
        else:
            return whole
    return total


def _written(program: Program, computation: str, types: list[str]) -> int:
    """Bytes that a fusion writes to HBM: of what it updates in place only the update."""
    root = program.root(computation)
    parts = [program.find(name) for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(types):  # its root has several results of its own
        parts, types = [root], [root.type]
    total = 0
    for part, type_ in zip(parts, types, strict=True):
        own = sum(array.hbm_bytes for array in arrays(type_))
        while part.opcode in _RENAMES and part.operands:
            part = program.find(part.operands[0])
        if part.opcode == "fusion" and (callee := part.called("calls")) and not part.type.startswith("("):
            own = min(own, _written(program, callee, [type_]))
        elif part.opcode == "dynamic-update-slice" and _is_parameter(program, part.operands[0]):
            update = arrays(program.operand_types(part)[1])
            own = min(own, sum(array.held_bytes for array in update))
        total += own
    return total


def _is_parameter(program: Program, name: str) -> bool:
    found = program.find(name)
    while found.opcode in _RENAMES and found.operands:
        found = program.find(found.operands[0])
    return found.opcode == "parameter"


def matmul_flops(program: Program, instruction: Instruction) -> int:
    """Operations of the matmuls in an instruction, a multiply-add is two; also in what a fusion calls."""
    if instruction.opcode == "fusion" and (callee := instruction.called("calls")):
        return sum(matmul_flops(program, inner) for inner in program.body(callee))
    if instruction.opcode not in ("convolution", "dot"):
        return 0
    left, right = (arrays(type_)[0].dims for type_ in program.operand_types(instruction))
    result = arrays(instruction.type)[0].dims
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        places = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2 * math.prod(result) * math.prod(left[n] for n in places)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        raise ValueError(f"convolution {instruction.name}: it has no dim_labels")
    on_left, on_right, on_result = labels[1], labels[2], labels[3]
    products = result[on_result.index("b")] * result[on_result.index("f")] * right[on_right.index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    settings = {key: value.split("x") for key, value in _WINDOW.findall(window[1] if window else "")}
    for n, digit in enumerate(digit for digit in on_result if digit.isdigit()):
        place = int(digit)

        def of(key: str, default: str, place: int = place) -> str:
            return settings[key][place] if key in settings else default

        before = int(of("pad", "0_0").split("_")[0])
        products *= _met(
            left[on_left.index(digit)],
            right[on_right.index(digit)],
            result[on_result.index(digit)],
            *(int(of(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")),
            before,
        )
    return 2 * products


def _met(left: int, right: int, result: int, stride: int, left_dilate: int, right_dilate: int, before: int) -> int:
    """How many pairs of places of a kernel and of a result meet an input, along one axis: XLA writes the batch of a
    matmul as an axis of a convolution, in which most pairs meet padding."""
    met = 0
    for place in range(result):
        for offset in range(right):
            at = place * stride - before + offset * right_dilate
            met += at >= 0 and at % left_dilate == 0 and at // left_dilate < left
    return met
