"""A lower bound on the time of a step, operation by operation: a second opinion to the compiler's estimate.

An operation takes as long as the slowest of three: its scheduled bundles at one per cycle, the bytes that it moves to
and from HBM at 85% of the bandwidth, and its matmuls at 95% of the peak. The step takes the sum. This leaves out the
launch of an operation, the latency of a transfer, bundles that wait for anything other than HBM, and all traffic
between chips.

Of the asynchronous operations, only transfers are assumed to overlap with others: any other operation counts as if it
ran where it is started (async-start and the opcodes that XLA writes for it, such as fusion-start).

Transfers between HBM and VMEM that overlap with other operations (copy-start, slice-start and their ends) cost only
what does not overlap: the operations between start and end leave the HBM idle for a part of their time, which is filled
first; the rest of the transfer is the end's own time.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable

from tvq_pod.planning.arrays import arrays
from tvq_pod.planning.bundles import Count
from tvq_pod.planning.hlo import Peak, Program
from tvq_pod.planning.module import Instruction, Module, source_of
from tvq_pod.planning.work import ENDS, STARTS, is_free, matmul_flops, moved_bytes, synchronous

HBM_SHARE = 0.85  # of the bandwidth
MATMUL_SHARE = 0.95  # of the peak


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that is executed, how often, and the work and time of one execution."""

    instruction: Instruction
    source: str
    times: int
    count: Count | None  # of bundles; None if unknown
    hbm_bytes: int
    flops: int
    hbm_cycles: float  # in which the HBM is busy
    cycles: float
    bound: str  # "bundles", "HBM" or "matmuls"


class Roofline:
    """The roofline of a scheduled program on a device with the given peak."""

    def __init__(self, program: Program, peak: Peak):
        self._module = program.module
        self._schedules = program.schedules
        self._peak = peak
        self.operations: list[Operation] = self._run(self._module.entry)

    @property
    def cycles(self) -> float:
        """Cycles of one execution, on one device."""
        return _total(self.operations)

    @property
    def hbm_bytes(self) -> int:
        """The bytes that one execution moves to and from a device's HBM."""
        return sum(operation.times * operation.hbm_bytes for operation in self.operations)

    def cycles_by_source(self) -> dict[str, float]:
        """Cycles by pass and source, the most expensive first, as in `Program.cycles_by_source`."""
        return self._by(lambda operation: operation.source)

    def cycles_by_bound(self) -> dict[str, float]:
        """The cycles of operations bound by bundles, by HBM and by matmuls."""
        return self._by(lambda operation: operation.bound)

    def bounds(self) -> dict[str, str]:
        """The bound of most cycles of each source."""
        totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for operation in self.operations:
            totals[operation.source][operation.bound] += round(operation.times * operation.cycles)
        return {source: by_bound.most_common(1)[0][0] for source, by_bound in totals.items()}

    def without_bundles(self) -> dict[str, int]:
        """The number of executions of operations with unknown bundles, or with a loop of unknown length, by source.
        Operations on single numbers are left out."""
        times: collections.Counter[str] = collections.Counter()
        for operation in self.operations:
            is_known = operation.count is not None and operation.count.is_exact
            is_small = all(array.bytes <= 8 for array in arrays(operation.instruction.type))
            if not is_known and not is_small and operation.instruction.opcode not in ENDS:
                times[operation.source] += operation.times
        return dict(times.most_common())

    def _by(self, key: Callable[[Operation], str]) -> dict[str, float]:
        totals: dict[str, float] = collections.defaultdict(float)
        for operation in self.operations:
            totals[key(operation)] += operation.times * operation.cycles
        return dict(sorted(((name, cycles) for name, cycles in totals.items() if cycles), key=lambda item: -item[1]))

    def _run(self, computation: str) -> list[Operation]:
        """The operations in one execution of a computation."""
        found: list[Operation] = []
        idle: list[float] = []  # cycles in which each instruction so far leaves the HBM idle
        started: dict[str, int] = {}
        for instruction in self._module.body(computation):
            inner = self._inside(instruction)
            if instruction.opcode in STARTS:
                started[instruction.name] = len(idle)
            elif instruction.opcode in ENDS:
                transfer = self._operation(instruction)
                left = transfer.hbm_cycles
                for place in range(started.get(instruction.operands[0], len(idle)), len(idle)):
                    filled = min(left, idle[place])
                    idle[place] -= filled
                    left -= filled
                inner = [dataclasses.replace(transfer, cycles=left, source=self._waits(computation, instruction))]
            elif not inner and not is_free(self._module, instruction):
                inner = [self._operation(synchronous(instruction))]
            busy = sum(operation.times * operation.hbm_cycles for operation in inner)
            idle.append(max(_total(inner) - busy, 0.0))
            found += inner
        return found

    def _inside(self, instruction: Instruction) -> list[Operation]:
        """The operations that a loop, a call or a conditional runs; for a conditional, those of the most expensive
        branch."""
        if instruction.opcode == "while":
            turns = self._module.turns(instruction)
            inner = self._run(instruction.needed("body"))
            return [dataclasses.replace(operation, times=turns * operation.times) for operation in inner]
        if instruction.opcode == "call":
            return self._run(instruction.needed("to_apply"))
        if instruction.opcode == "async-start":
            return self._run(instruction.needed("calls"))
        if instruction.opcode == "conditional":
            return max((self._run(branch) for branch in instruction.branches), key=_total, default=[])
        return []

    def _waits(self, computation: str, end: Instruction) -> str:
        """The source of a transfer: the first operation that uses its result, or else the one that made its operand."""
        users = [user for user in self._module.users(computation, end.name) if "op_name=" in user.rest]
        if users:
            return f"{source_of(users[0])}, waiting for HBM"
        made = self._module.find(self._module.find(end.operands[0]).operands[0])
        return f"{source_of(made)}, writing to HBM" if "op_name=" in made.rest else "other (transfer)"

    def _operation(self, instruction: Instruction) -> Operation:
        size, flops = moved_bytes(self._module, instruction), matmul_flops(self._module, instruction)
        count = self._schedules.count(instruction)
        hbm = size / (HBM_SHARE * self._peak.hbm_bytes)
        matmuls = flops / (MATMUL_SHARE * self._peak.flops)
        bundles = float(count.cycles if count else 0)
        cycles, bound = max((bundles, "bundles"), (hbm, "HBM"), (matmuls, "matmuls"))
        return Operation(instruction, source_of(instruction), 1, count, size, flops, hbm, cycles, bound)


def with_schedules(module: Module) -> set[str]:
    """The names of the operations whose schedules a roofline may need."""
    return {i.name for body in module.computations() for i in body if not is_free(module, i)}


def _total(operations: Iterable[Operation]) -> float:
    return sum(operation.times * operation.cycles for operation in operations)
