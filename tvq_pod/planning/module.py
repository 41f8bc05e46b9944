"""Parses the text of a compiled program, `compiled.as_text()`: computations of an instruction a line, one the entry."""

import dataclasses
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FREE_CALLS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "Sharding",
)
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
        return re.findall(r"%([^\s,()]+)", self.rest[: self._operands_end()])

    @property
    def attributes(self) -> str:
        """What follows its operands."""
        return self.rest[self._operands_end() + 1 :]

    @property
    def argument(self) -> str:
        """What stands in its parentheses if that is not an operand: a constant's value, a parameter's place."""
        return self.rest[: self._operands_end()]

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names, as in calls=%fused_computation."""
        found = re.search(rf"\b{attribute}=%([^,\s)}}]+)", self.rest)
        return found[1] if found else None

    def needed(self, attribute: str) -> str:
        """As `called`, of an attribute that the instruction must have. Raises ValueError if it has none."""
        called = self.called(attribute)
        if called is None:
            raise ValueError(f"{self.opcode} {self.name}: has no {attribute}")
        return called

    @property
    def branches(self) -> list[str]:
        """The computations of which a conditional runs one."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"%([^,\s]+)", listed[1])
        return [name for attribute in ("true_computation", "false_computation") if (name := self.called(attribute))]

    @property
    def is_collective(self) -> bool:
        """Whether it sends to other devices, or waits for what they send."""
        return self.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES

    @property
    def is_free(self) -> bool:
        """Whether it is a custom call that only tells the compiler something."""
        target = _TARGET.search(self.rest)
        return self.opcode == "custom-call" and target is not None and target[1] in _FREE_CALLS

    def _operands_end(self) -> int:
        depth = 1
        for place, letter in enumerate(self.rest):
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                return place
        return len(self.rest)


class Module:
    """A scheduled program as text. Raises ValueError on a text that is none."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        entry: str | None = None
        name: str | None = None
        for line in text.splitlines():
            if opening := _COMPUTATION.match(line):
                name = str(opening[2])
                self._computations.setdefault(name, [])
                entry = name if opening[1] else entry
            elif name is not None and (found := _INSTRUCTION.match(line)):
                instruction = Instruction(*found.groups()[1:])
                self._computations[name].append(instruction)
                if found[1]:
                    self._roots[name] = instruction
        if entry is None:
            raise ValueError("no HLO module: it has no ENTRY computation")
        self.entry: str = entry
        self._by_name = {i.name: i for body in self._computations.values() for i in body}
        self._users: dict[str, dict[str, list[Instruction]]] = {}

    def __contains__(self, computation: str | None) -> bool:
        return computation in self._computations

    def body(self, computation: str) -> list[Instruction]:
        """The instructions of a computation, in their order."""
        return self._computations[computation]

    def computations(self) -> list[list[Instruction]]:
        """The instructions of all computations."""
        return list(self._computations.values())

    def named_computations(self) -> list[tuple[str, list[Instruction]]]:
        """All computations: their names, and their instructions in order."""
        return list(self._computations.items())

    def find(self, name: str) -> Instruction:
        """The instruction of that name."""
        return self._by_name[name]

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is the computation's."""
        return self._roots[computation]

    def parameters(self, computation: str) -> dict[int, Instruction]:
        """A computation's parameters, by their places."""
        return {int(i.argument): i for i in self.body(computation) if i.opcode == "parameter"}

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
        return [self._by_name[name].type if name in self._by_name else "" for name in instruction.operands]

    def turns(self, loop: Instruction) -> int:
        """How often a while turns. Raises ValueError if that can't be read."""
        if known := _TRIP_COUNT.search(loop.rest):
            return int(known[1])
        condition = self._computations[loop.needed("condition")]
        limits = [int(i.argument) for i in condition if i.opcode == "constant" and i.argument.isdigit()]
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
