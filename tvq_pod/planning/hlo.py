"""Reads the program that XLA's TPU compiler scheduled: its own estimate of cycles, and what is sent between chips.

The text is that of `compiled.as_text()`: computations, of which one is the entry, with an instruction a line. A `while`
counts as often as it turns.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from tvq_pod.planning.arrays import arrays, top_level

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FREE_CALLS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "Sharding",
)
_NO_WORK = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional")
_ATTRIBUTES = re.compile(
    r"\b(?:kind|dimensions|slice|dynamic_slice_sizes|window|dim_labels|\w+_contracting_dims|\w+_batch_dims|padding|"
    r"direction|custom_call_target|feature_group_count|batch_group_count|iota_dimension|index)=(?:\{[^}]*\}|[^\s,]+)"
)
_KERNEL = re.compile(r'"body":"[^"]*"')
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str  # of what it returns
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        depth = 1
        for place, letter in enumerate(self.rest):
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                return re.findall(r"%([^\s,()]+)", self.rest[:place])
        return []

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names, as in calls=%fused_computation."""
        return _called(self.rest, attribute)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All instructions of one kind that cross the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    count: int  # a step
    bytes: int  # a step, a device: what the operation returns, or for reduce-scatter takes


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one device does in a cycle, at most."""

    flops: float
    hbm_bytes: float


class Program:
    """A scheduled program. Raises ValueError on a text that is none.

    peak: kernels written by hand carry no estimate of cycles but one of their work, which takes at least so long.
    bundles: what the compiler scheduled for operations, by their names: a kernel takes at least so many cycles.
    """

    def __init__(self, text: str, peak: Peak | None = None, bundles: Mapping[str, int] | None = None):
        self._peak = peak
        self._bundles = bundles or {}
        self._by_signature: dict[str, int] | None = None
        self._signatures: dict[str, str] = {}
        self._computations: dict[str, list[Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        entry: str | None = None
        name: str | None = None
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if opening := _COMPUTATION.match(line):
                name = opening[2]
                current = self._computations.setdefault(name, [])
                entry = opening[2] if opening[1] else entry
            elif current is not None and name and (found := _INSTRUCTION.match(line)):
                current.append(Instruction(*found.groups()))
                if line.lstrip().startswith("ROOT ") or name not in self._roots:
                    self._roots[name] = current[-1]
        if entry is None:
            raise ValueError("no HLO module: it has no ENTRY computation")
        self._entry = entry
        self._by_name = {i.name: i for body in self._computations.values() for i in body}
        self._users: dict[str, dict[str, list[Instruction]]] = {}
        self._types = {i.name: i.type for body in self._computations.values() for i in body}

    @property
    def entry(self) -> str:
        """The computation that is run."""
        return self._entry

    def body(self, computation: str) -> list[Instruction]:
        """The instructions of a computation in their order."""
        return self._computations[computation]

    def find(self, name: str) -> Instruction:
        """The instruction of that name."""
        return self._by_name[name]

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is the computation's."""
        return self._roots[computation]

    def users(self, computation: str, name: str) -> list[Instruction]:
        """The instructions of a computation that take the result of `name`."""
        if computation not in self._users:
            users = self._users[computation] = {}
            for instruction in self._computations[computation]:
                for operand in dict.fromkeys(instruction.operands):
                    users.setdefault(operand, []).append(instruction)
        return self._users[computation].get(name, [])

    def operand_types(self, instruction: Instruction) -> list[str]:
        """Types of its operands, in their order."""
        return [self._types.get(name, "") for name in instruction.operands]

    def bundles(self, instruction: Instruction) -> int | None:
        """Bundles that it runs; None if they are not known. The compiler compiles equal operations once, and dumps them
        under the name of one of them."""
        if instruction.name in self._bundles:
            return self._bundles[instruction.name]
        if self._by_signature is None:
            self._by_signature = {}
            for other in itertools.chain.from_iterable(self._computations.values()):
                if other.name in self._bundles:
                    self._by_signature[self._signature(other)] = self._bundles[other.name]
        if not self._bundles or instruction.opcode in _NO_WORK:
            return None
        return self._by_signature.get(self._signature(instruction))

    def _signature(self, instruction: Instruction) -> str:
        """Equal for two operations that are compiled to the same bundles."""
        types = " ".join(self.operand_types(instruction))
        attributes = _attributes(instruction)
        callee = _called(instruction.rest, "calls")
        inside = self._inside(callee) if callee in self._computations else ""
        return f"{instruction.opcode} {instruction.type} {types} {attributes} {inside}"

    def _inside(self, computation: str) -> str:
        """A computation's text, with its instructions numbered instead of named."""
        if computation not in self._signatures:
            numbers = {i.name: f"%{n}" for n, i in enumerate(self._computations[computation])}
            lines = []
            for instruction in self._computations[computation]:
                operands = ",".join(numbers.get(name, name) for name in instruction.operands)
                own = instruction.rest.partition(")")[0] if not operands else ""  # a constant's value, a parameter's place
                callee = _called(instruction.rest, "calls")
                inside = self._inside(callee) if callee in self._computations else ""
                lines.append(f"{instruction.type} {instruction.opcode} {operands}{own} {_attributes(instruction)} {inside}")
            self._signatures[computation] = "; ".join(lines)
        return self._signatures[computation]

    def cycles(self) -> int:
        """The compiler's estimate for one run, on one device. Collectives carry no estimate and count as 0."""
        return sum(self._cycles_by(lambda instruction: None).values())

    def cycles_by_source(self) -> dict[str, int]:
        """Cycles by pass and source, the dearest first: "backward layers/unit0 bhlm,bhmv->bhlv"."""
        by_source = self._cycles_by(source_of)
        return dict(sorted(by_source.items(), key=lambda item: -item[1]))

    def without_estimate(self) -> dict[str, int]:
        """How often operations run that the compiler gives no cycles for, by source: gathers, scatters, kernels written
        by hand. Collectives, and what only renames memory, are left out."""
        count = collections.Counter()
        for instruction, times in self._instructions(self._entry, 1):
            is_work = instruction.opcode in ("fusion", "custom-call", "gather", "scatter", "sort")
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            if target and target[1] in _FREE_CALLS:
                continue
            callee = _called(instruction.rest, "calls")
            if is_work and not self._own_cycles(instruction) and not (callee and any(True for _ in self._sent(callee))):
                count[source_of(instruction)] += times
        return dict(count.most_common())

    def _own_cycles(self, instruction: Instruction) -> int:
        if found := _CYCLES.search(instruction.rest):
            return int(found[1])
        if self._peak and instruction.opcode == "custom-call" and (found := COST.search(instruction.rest)):
            least = math.ceil(max(int(found[1]) / self._peak.flops, int(found[2]) / self._peak.hbm_bytes))
            return max(least, self.bundles(instruction) or 0)
        return 0

    def _cycles_by(self, key) -> dict:
        totals = collections.Counter()
        for instruction, times in self._instructions(self._entry, 1):
            if own := self._own_cycles(instruction):
                totals[key(instruction)] += times * own
        return totals

    def collectives(self, mesh_axes: Iterable[tuple[str, int]]) -> list[Collective]:
        """What a device sends and receives in one run; mesh_axes: names and sizes in the mesh's order. Axes of one name
        are one."""
        count: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
        size: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
        for kind, instruction, times in self._sent(self._entry):
            try:
                groups = replica_groups(instruction.rest)
                axes = crossed_axes(groups, mesh_axes)
            except ValueError:  # libtpu's next version may write them in another way: say so, and count all the same
                groups, axes = [[0]], ("unknown",)
            key = kind, axes
            count[key] += times
            size[key] += times * _returned_bytes(instruction) * (len(groups[0]) if _is_scattered(instruction) else 1)
        found = sorted(count, key=lambda key: -size[key])
        return [Collective(kind, axes, count[kind, axes], size[kind, axes]) for kind, axes in found]

    def _sent(self, computation: str):
        """Every collective that is run: its kind, the instruction, and how often.

        libtpu also puts them into fusions: one that runs beside matmuls is split over several, which name the same
        channel; and a reduce-scatter is an all-reduce in a computation that keeps this device's part.
        """
        channels = set()
        for instruction, times in self._instructions(computation, 1):
            if (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
                yield kind, instruction, times
            elif instruction.opcode == "fusion" and (callee := _called(instruction.rest, "calls")):
                for kind, part, _ in self._sent(callee):
                    channel = re.search(r"channel_id=(\d+)", part.rest)
                    if channel and channel[1] in channels:
                        continue
                    channels |= {channel[1]} if channel else set()
                    yield "reduce-scatter" if callee.startswith("all-reduce-scatter") else kind, part, times

    def _instructions(self, computation: str, times: int):
        """Every instruction that is run, with how often; what is inside a fusion is the fusion's."""
        for instruction in self._computations[computation]:
            yield instruction, times
            if instruction.opcode == "while":
                turns = times * self.turns(instruction)
                yield from self._instructions(_needed(instruction, "body"), turns)
            elif instruction.opcode in ("call", "async-start"):
                callee = _called(instruction.rest, "to_apply") or _called(instruction.rest, "calls")
                if callee:
                    yield from self._instructions(callee, times)
            elif instruction.opcode == "conditional":  # the dearest branch
                names = branches(instruction.rest)
                cost = {name: sum(t * self._own_cycles(i) for i, t in self._instructions(name, 1)) for name in names}
                yield from self._instructions(max(cost, key=lambda name: cost[name]), times)

    def turns(self, loop: Instruction) -> int:
        """How often a while turns. Raises ValueError if that can't be read."""
        if known := _TRIP_COUNT.search(loop.rest):
            return int(known[1])
        condition = self._computations[_needed(loop, "condition")]
        limits = [
            int(found[1]) for i in condition if i.opcode == "constant" and (found := re.match(r"(\d+)\)", i.rest))
        ]
        if len(limits) != 1:
            raise ValueError(f"while {loop.name}: its trip count can't be read from its condition")
        return limits[0]


def source_of(instruction: Instruction) -> str:
    """Pass, module path and operation, from an instruction's metadata; its opcode, where that is all there is."""
    found = _OP_NAME.search(instruction.rest)
    if not found:
        return f"other ({instruction.opcode})"
    path = found[1]
    passage = "recompute" if "rematted_computation" in path else "backward" if "transpose(" in path else "forward"
    parts = [part for part in path.split("/") if not _is_noise(part)]
    if "jvp(" not in path:
        passage = "update"
    kept = [part for n, part in enumerate(parts) if n == 0 or part != parts[n - 1]]
    return f"{passage} {'/'.join(kept) or f'({instruction.opcode})'}"


def _is_noise(part: str) -> bool:
    return part in ("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation") or bool(
        re.match(r"(jit|jvp|transpose|pjit|vmap)\(", part)
    )


def replica_groups(rest: str) -> list[list[int]]:
    """The groups of devices that a collective joins, by their places in the mesh. Raises ValueError on a new form."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return [[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape = [int(n) for n in iota[3].split(",")]
        ids = np.arange(math.prod(shape)).reshape(shape)
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return ids.reshape(int(iota[1]), int(iota[2])).tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        joined = re.findall(r"'(\w+)'", named[4])
        ids = np.arange(math.prod(map(int, sizes.values())))
        if named[2]:
            ids = ids.reshape([int(n) for n in named[2].split(",")])
            ids = ids.transpose([int(n) for n in named[3].split(",")]) if named[3] else ids
        ids = ids.reshape([int(n) for n in sizes.values()])
        names = list(sizes)
        kept = [names.index(name) for name in names if name not in joined]
        last = [names.index(name) for name in joined]
        return ids.transpose(kept + last).reshape(-1, math.prod(int(sizes[name]) for name in joined)).tolist()
    raise ValueError(f"replica groups of an unknown form: {rest[:300]}")


def crossed_axes(groups: list[list[int]], mesh_axes: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    names, sizes = zip(*mesh_axes, strict=True)
    crossed = set()
    for first, other in itertools.chain.from_iterable(((group[0], n) for n in group[1:]) for group in groups):
        a, b = (np.unravel_index(n, sizes) for n in (first, other))
        crossed |= {name for name, x, y in zip(names, a, b, strict=True) if x != y}
    return tuple(name for name in dict.fromkeys(names) if name in crossed)


def _is_scattered(collective: Instruction) -> bool:
    """Whether it returns a device's part of what it takes."""
    return collective.opcode.startswith("reduce-scatter")


def _returned_bytes(collective: Instruction) -> int:
    """Bytes of what a collective returns. One that only starts has a type (what it takes, what it returns, more)."""
    parts = top_level(collective.type)
    is_start = collective.opcode.endswith("-start") and not collective.opcode.startswith("all-reduce")
    returned = parts[1] if is_start and len(parts) > 1 else collective.type
    return sum(array.bytes for array in arrays(returned))


def _attributes(instruction: Instruction) -> str:
    """What decides on an operation's program, but for its operands and the computation that it calls."""
    return " ".join(_ATTRIBUTES.findall(instruction.rest) + _KERNEL.findall(instruction.rest))


def is_collective(instruction: Instruction) -> bool:
    """Whether it sends to other devices, or waits for them."""
    return instruction.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a custom call that computes."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return instruction.opcode == "custom-call" and not (target and target[1] in _FREE_CALLS)


def _called(rest: str, attribute: str) -> str | None:
    found = re.search(rf"\b{attribute}=%([^,\s)}}]+)", rest)
    return found[1] if found else None


def _needed(instruction: Instruction, attribute: str) -> str:
    """As _called, of an attribute that the instruction must have."""
    called = _called(instruction.rest, attribute)
    if called is None:
        raise ValueError(f"{instruction.opcode} {instruction.name}: has no {attribute}")
    return called


def branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if listed:
        return re.findall(r"%([^,\s]+)", listed[1])
    return [name for attribute in ("true_computation", "false_computation") if (name := _called(rest, attribute))]
