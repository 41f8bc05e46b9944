"""Counts the bundles that a compiled operation executes, from the TPU compiler's dump of its final schedule.

A TensorCore issues one bundle of instructions per cycle unless it stalls. The dump lists the bundles of an operation
once, whatever its loops and branches do. So this module executes the scalar part of the program: it follows the
branches with the values of the loop counters and of the predicates computed from them, and counts the bundles that it
passes. It assumes:

- A grid is one loop, with an iteration or two more than the grid has steps: the first only fetches and the last only
  writes back. These iterations skip the body by a branch, as `pl.when` does, so they count only what they execute.
- The four bundles after a branch are executed whether it is taken or not (they are its delay slots). - A value that
depends on data (an operand, or memory that the program itself did not write) is unknown. A region that is skipped on an
unknown condition counts as executed; a loop with an unknown condition counts one iteration, and `Count.is_exact` is
False. It is also False if the count stopped before the program ended, at `_MOST_TURNS`. - A dump ends with the bundle
that the compiler marks as the exit, and the bundles are numbered without a gap. A text for which this does not hold is
truncated. - Waiting for memory takes no bundles. The time is the larger of these cycles and those of the memory
traffic.
"""

import bisect
import dataclasses
import itertools
import operator
import re
from collections.abc import Callable

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +([A-Z]{2})? *:[ >]* \{", re.MULTILINE)
_SCALAR = re.compile(r"%(?:([sp]\d+)_[sp]\d+|\d+) = (s(?!hal)[a-z]\w*(?:\.\w+)*|p[a-z]+|int_to_ptr\.\w+) ?([^;{}]*)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_TARGET = re.compile(r"target = \$region(\d+)")
_EXIT = "/* exit bundle:"
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_TOKEN = re.compile(r"(!?)%([sp]\d+)_[sp]\d+|\b(\d+)\b")
_SLOT = re.compile(r"\[smem:\[(#allocation\w+)\]\]")
_GUARD = re.compile(r"^\((!?)%(p\d+)_p\d+\),? *")
_SELECT = re.compile(r"^\((!?)%(p\d+)_p\d+, (%s\d+_s\d+|\d+)\), (.*)")
_DELAY_SLOTS = 4
_MOST_TURNS = 300_000  # blocks to follow before the count gives up
_WORD = 2**32

Value = int | None  # None: unknown


@dataclasses.dataclass(frozen=True)
class Count:
    """cycles: bundles executed; static: bundles listed; is_exact: whether the iterations of every loop were known, and
    all were counted."""

    cycles: int
    static: int
    is_exact: bool


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A name's value, or a constant; negated if it is a predicate with a "!"."""

    name: str | None
    constant: Value = None
    is_negated: bool = False


@dataclasses.dataclass(frozen=True)
class _Instruction:
    bundle: int
    result: str | None  # a name, or a store's slot in memory
    opcode: str
    operands: tuple[_Operand, ...]
    guard: _Operand | None = None  # the instruction does nothing if this is false


@dataclasses.dataclass(frozen=True)
class _Branch:
    bundle: int
    condition: _Operand | None  # None: always taken
    target: int  # a bundle's number


def count_bundles(text: str) -> Count:
    """Executes the program in a dump. Raises ValueError if the text is not a complete dump, or a branch has no
    target."""
    heads = list(_BUNDLE.finditer(text))
    if not heads:
        raise ValueError("no schedule: it has no bundles")
    starts = [found.start() for found in heads]
    if int(heads[-1][1], 16) != len(heads) - 1 or text.find(_EXIT, starts[-1]) < 0:
        raise ValueError(f"a truncated schedule: it has {len(heads)} bundles, and some are missing")
    regions = {found[1]: _bundle_of(starts, found.start()) for found in _REGION.finditer(text)}
    targets = {found[1] for found in _TARGET.finditer(text)}
    named = {bundle for region, bundle in regions.items() if region in targets}
    # a few regions are not listed: they begin at a bundle that is marked as a jump target but has no name
    unnamed = [n for n, found in enumerate(heads) if found[2] in ("PF", "CT") and n not in named]
    instructions, branches = [], []
    for found in _SCALAR.finditer(text):
        bundle = _bundle_of(starts, found.start())
        name, opcode, rest = found.groups()
        if opcode.startswith("sbr"):
            target = _TARGET.search(rest)
            to = regions.get(target[1] if target else "", next((n for n in unnamed if n > bundle), None))
            if to is None:
                raise ValueError(f"a branch whose target can't be read: {rest[:80]}")
            guard = _GUARD.match(rest)
            condition = _Operand(guard[2], is_negated=bool(guard[1])) if guard else None
            branches.append(_Branch(bundle, condition, to))
        else:
            instructions.append((bundle, name, opcode, rest))
    return _run(len(starts), _needed([_parsed(*parts) for parts in instructions], branches), branches)


def _bundle_of(starts: list[int], position: int) -> int:
    return max(bisect.bisect_right(starts, position) - 1, 0)


def _parsed(bundle: int, name: str | None, opcode: str, rest: str) -> _Instruction:
    rest = _COMMENT.sub("", rest)
    guard = None
    if found := _GUARD.match(rest):
        guard = _Operand(found[2], is_negated=bool(found[1]))
        rest = rest[found.end() :]
    if opcode in ("sld", "sst"):
        slot = _SLOT.match(rest)
        where = slot[1] if slot else "elsewhere"
        if opcode == "sld":
            return _Instruction(bundle, name, opcode, (_Operand(where) if slot else _Operand(None),), guard)
        return _Instruction(bundle, where, opcode, _operands(rest[slot.end() :] if slot else ""), guard)
    if opcode in ("smov", "pmov") and (found := _SELECT.match(rest)):
        chosen = (_Operand(found[2], is_negated=bool(found[1])), *_operands(found[4])[:1], *_operands(found[3]))
        return _Instruction(bundle, name, "scalar_select", chosen, guard)
    return _Instruction(bundle, name, opcode, _operands(rest), guard)


def _operands(text: str) -> tuple[_Operand, ...]:
    return tuple(
        _Operand(found[2], is_negated=bool(found[1])) if found[2] else _Operand(None, int(found[3]) % _WORD)
        for found in _TOKEN.finditer(text)
    )


def _needed(instructions: list[_Instruction], branches: list[_Branch]) -> list[_Instruction]:
    """The instructions that a branch's condition depends on, in order; phis come first in their bundle, since they are
    not machine instructions but names for what a register holds when the bundle begins."""
    by_result: dict[str, list[_Instruction]] = {}
    for instruction in instructions:
        if instruction.result is not None:
            by_result.setdefault(instruction.result, []).append(instruction)
    found: set[str] = set()
    open_names = [branch.condition.name for branch in branches if branch.condition]
    while open_names:
        name = open_names.pop()
        if name is None or name in found:
            continue
        found.add(name)
        for instruction in by_result.get(name, []):
            open_names += [operand.name for operand in instruction.operands]
            open_names += [instruction.guard.name] if instruction.guard else []
    kept = [instruction for instruction in instructions if instruction.result in found]
    return sorted(kept, key=lambda instruction: (instruction.bundle, instruction.opcode != "sphi"))


def _run(n_bundles: int, instructions: list[_Instruction], branches: list[_Branch]) -> Count:
    by_bundle = {branch.bundle: branch for branch in branches}
    # a block ends before a jump target, and after the delay slots of a branch
    ends = {branch.target for branch in branches} | {branch.bundle + 1 + _DELAY_SLOTS for branch in branches}
    borders = sorted({0, n_bundles} | {end for end in ends if end < n_bundles})
    first = [bisect.bisect_left(instructions, border, key=lambda i: i.bundle) for border in borders]
    blocks = {}
    for n, (start, end) in enumerate(itertools.pairwise(borders)):
        branch = next((by_bundle[b] for b in range(start, end) if b in by_bundle), None)
        blocks[start] = end, instructions[first[n] : first[n + 1]], branch
    machine, place, cycles, is_exact = _Scalars(), 0, 0, True
    for _ in range(_MOST_TURNS):
        if place >= n_bundles:
            return Count(cycles, n_bundles, is_exact)
        end, body, branch = blocks[place]
        cycles += end - place
        is_taken: Value = 0
        for instruction in body:
            if branch and instruction.bundle > branch.bundle:
                break
            machine.step(instruction)
        if branch:
            is_taken = machine.value(branch.condition) if branch.condition else 1
            for instruction in body:
                if instruction.bundle > branch.bundle:
                    machine.step(instruction)
            if is_taken is None:
                is_exact = is_exact and branch.target > branch.bundle
        place = branch.target if branch and is_taken else end
    return Count(cycles, n_bundles, is_exact=False)


class _Scalars:
    """The values of scalar registers and of the memory slots that they are spilled to, by the names in the dump."""

    def __init__(self):
        self._values: dict[str, Value] = {}
        self._written: dict[str, int] = {}  # time of the write: a phi takes the operand written last
        self._time = 0

    def value(self, operand: _Operand) -> Value:
        found = operand.constant if operand.name is None else self._values.get(operand.name)
        return int(not found) if operand.is_negated and found is not None else found

    def step(self, instruction: _Instruction) -> None:
        if instruction.guard:
            is_run = self.value(instruction.guard)
            if is_run == 0:
                return
            result = self._result(instruction) if is_run else None
        else:
            result = self._result(instruction)
        assert instruction.result is not None, "only instructions that a branch depends on are executed"
        self._time += 1
        self._values[instruction.result] = result
        self._written[instruction.result] = self._time

    def _result(self, instruction: _Instruction) -> Value:
        if instruction.opcode == "sphi":
            latest = max(instruction.operands, key=lambda o: self._written.get(o.name or "", 0))
            return self.value(latest)
        values = [self.value(operand) for operand in instruction.operands]
        if instruction.opcode == "scalar_select" and len(values) == 3:
            return None if values[0] is None else values[1] if values[0] else values[2]
        name, _, kind = instruction.opcode.partition(".")
        if name in _LOGIC and len(values) == 2:
            return _LOGIC[name](*values)
        if not values or any(value is None for value in values):
            return None
        known = [value for value in values if value is not None]
        if name == "scmp" and len(known) == 2:
            comparison, _, rest = kind.partition(".")
            if rest.startswith("s32"):
                known = [_signed(value) for value in known]
            return int(_COMPARISONS[comparison](*known)) if comparison in _COMPARISONS else None
        if name in _COPIES:
            return known[0]
        if name == "pneg":
            return int(not known[0])
        if name in _ARITHMETIC and len(known) == 2:
            if kind == "s32":
                known = [_signed(value) for value in known]
            return _ARITHMETIC[name](*known) % _WORD
        return None


def _signed(value: int) -> int:
    return value - _WORD if value >= _WORD // 2 else value


def _or(a: Value, b: Value) -> Value:
    return 1 if a or b else None if a is None or b is None else 0


def _and(a: Value, b: Value) -> Value:
    return 0 if a == 0 or b == 0 else None if a is None or b is None else 1


def _not(a: Value) -> Value:
    return None if a is None else int(not a)


_LOGIC: dict[str, Callable[[Value, Value], Value]] = {
    "por": _or,
    "pand": _and,
    "pnand": lambda a, b: _not(_and(a, b)),
    "pnor": lambda a, b: _not(_or(a, b)),
    "pxor": lambda a, b: None if a is None or b is None else int(bool(a) != bool(b)),
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda a, b: a << b if b < 32 else 0,
    "sshrl": lambda a, b: a % _WORD >> b,
    "sshra": lambda a, b: _signed(a % _WORD) >> b,
    "smin": min,
    "smax": max,
}
_COPIES = ("smov", "pmov", "sld", "sst", "int_to_ptr")
