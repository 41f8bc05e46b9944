"""Reads the program that XLA's TPU compiler scheduled: its own estimate of cycles, and the traffic between chips.

The body of a `while` counts once per iteration.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from tvq_pod.planning.arrays import arrays, top_level
from tvq_pod.planning.bundles import Count
from tvq_pod.planning.module import COLLECTIVES, Instruction, Module, source_of
from tvq_pod.planning.schedules import Schedules

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All instructions of one kind that cross the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    count: int  # per step
    bytes: int  # per step and device: what the operation returns or, for reduce-scatter, takes


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most that one device does in a cycle."""

    flops: float
    hbm_bytes: float


class Program:
    """A scheduled program, from its text or its module. Raises ValueError for a text that is not a program.

    peak: hand-written kernels have no estimate of cycles but one of their work, which gives a lower bound. counts: the
    bundles that the compiler scheduled for operations, by their names: kernels take at least these.
    """

    def __init__(self, program: str | Module, peak: Peak | None = None, counts: Mapping[str, Count] | None = None):
        self.module = program if isinstance(program, Module) else Module(program)
        self.schedules = Schedules(self.module, counts or {})
        self._peak = peak

    def cycles(self) -> int:
        """The compiler's estimate for one run, on one device. Collectives have no estimate and count as 0."""
        return sum(self._cycles_by(lambda instruction: None).values())

    def cycles_by_source(self) -> dict[str, int]:
        """Cycles by pass and source, the most expensive first: "backward layers/unit0 bhlm,bhmv->bhlv"."""
        by_source = self._cycles_by(source_of)
        return dict(sorted(by_source.items(), key=lambda item: -item[1]))

    def without_estimate(self) -> dict[str, int]:
        """The number of executions of operations without an estimate of cycles, by source: gathers, scatters,
        hand-written kernels. Collectives, and operations that only rename memory, are left out."""
        count = collections.Counter()
        for instruction, times in self._instructions(self.module.entry, 1):
            is_work = instruction.opcode in ("fusion", "custom-call", "gather", "scatter", "sort")
            if instruction.is_free:
                continue
            callee = instruction.called("calls")
            if is_work and not self._own_cycles(instruction) and not (callee and any(True for _ in self._sent(callee))):
                count[source_of(instruction)] += times
        return dict(count.most_common())

    def _own_cycles(self, instruction: Instruction) -> int:
        if found := _CYCLES.search(instruction.rest):
            return int(found[1])
        if self._peak and instruction.opcode == "custom-call" and not instruction.is_free:
            flops, size = cost_estimate(instruction) or (0, 0)
            count = self.schedules.count(instruction)
            least = max(flops / self._peak.flops, size / self._peak.hbm_bytes)
            return max(math.ceil(least), count.cycles if count else 0)
        return 0

    def _cycles_by(self, key) -> dict:
        totals = collections.Counter()
        for instruction, times in self._instructions(self.module.entry, 1):
            if own := self._own_cycles(instruction):
                totals[key(instruction)] += times * own
        return totals

    def collectives(self, mesh_axes: Iterable[tuple[str, int]]) -> list[Collective]:
        """The collectives that a device takes part in during one run. mesh_axes: names and sizes in the mesh's order.
        Axes with the same name count as one."""
        count: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
        size: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
        for kind, instruction, times in self._sent(self.module.entry):
            try:
                groups = replica_groups(instruction.rest)
                axes = crossed_axes(groups, mesh_axes)
            except ValueError:  # libtpu may write them differently some day: report that, and count anyway
                groups, axes = [[0]], ("unknown",)
            key = kind, axes
            count[key] += times
            size[key] += times * _returned_bytes(instruction) * (len(groups[0]) if _is_scattered(instruction) else 1)
        found = sorted(count, key=lambda key: -size[key])
        return [Collective(kind, axes, count[kind, axes], size[kind, axes]) for kind, axes in found]

    def _sent(self, computation: str):
        """Yields every collective that is executed: its kind, the instruction, and how often.

        libtpu also puts collectives into fusions: one that overlaps with matmuls is split over several fusions with the
        same channel; and a reduce-scatter is an all-reduce in a computation that keeps this device's part.
        """
        channels = set()
        for instruction, times in self._instructions(computation, 1):
            if (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
                yield kind, instruction, times
            elif instruction.opcode == "fusion" and (callee := instruction.called("calls")):
                for kind, part, _ in self._sent(callee):
                    channel = re.search(r"channel_id=(\d+)", part.rest)
                    if channel and channel[1] in channels:
                        continue
                    channels |= {channel[1]} if channel else set()
                    yield "reduce-scatter" if callee.startswith("all-reduce-scatter") else kind, part, times

    def _instructions(self, computation: str, times: int):
        """Yields every instruction that is executed, and how often; the content of a fusion belongs to the fusion."""
        for instruction in self.module.body(computation):
            yield instruction, times
            if instruction.opcode == "while":
                turns = times * self.module.turns(instruction)
                yield from self._instructions(instruction.needed("body"), turns)
            elif instruction.opcode in ("call", "async-start"):
                callee = instruction.called("to_apply") or instruction.called("calls")
                if callee:
                    yield from self._instructions(callee, times)
            elif instruction.opcode == "conditional":  # the most expensive branch
                names = instruction.branches
                cost = {name: sum(t * self._own_cycles(i) for i, t in self._instructions(name, 1)) for name in names}
                yield from self._instructions(max(cost, key=lambda name: cost[name]), times)


def cost_estimate(instruction: Instruction) -> tuple[int, int] | None:
    """FLOPs and bytes to and from memory, as stated by a kernel's author; None if they are not stated."""
    found = _COST.search(instruction.rest)
    return (int(found[1]), int(found[2])) if found else None


def replica_groups(rest: str) -> list[list[int]]:
    """The groups of devices that a collective joins, by their positions in the mesh. Raises ValueError for an unknown
    form."""
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
    """Whether a collective returns only the device's part of its operand."""
    return collective.opcode.startswith("reduce-scatter")


def _returned_bytes(collective: Instruction) -> int:
    """The bytes of a collective's result. A start operation has a type (operand, result, more)."""
    parts = top_level(collective.type)
    is_start = collective.opcode.endswith("-start") and not collective.opcode.startswith("all-reduce")
    returned = parts[1] if is_start and len(parts) > 1 else collective.type
    return sum(array.bytes for array in arrays(returned))
