"""Parses the text of a compiled program, `compiled.as_text()`: computations, one of them the entry, with an instruction
per line."""

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
    type: str  # of its result
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([^\s,()]+)", self.rest[: self._operands_end()])

    @property
    def attributes(self) -> str:
        """The text after the operands."""
        return self.rest[self._operands_end() + 1 :]

    @property
    def argument(self) -> str:
        """The text in parentheses if it is not an operand: a constant's value, a parameter's number."""
        return self.rest[: self._operands_end()]

    def called(self, attribute: str) -> str | None:
        """The computation in an attribute, as in calls=%fused_computation."""
        found = re.search(rf"\b{attribute}=%([^,\s)}}]+)", self.rest)
        return found[1] if found else None

    def needed(self, attribute: str) -> str:
        """Like `called`, for an attribute that the instruction must have. Raises ValueError if it is missing."""
        called = self.called(attribute)
        if called is None:
            raise ValueError(f"{self.opcode} {self.name}: has no {attribute}")
        return called

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"%([^,\s]+)", listed[1])
        return [name for attribute in ("true_computation", "false_computation") if (name := self.called(attribute))]

    @property
    def is_collective(self) -> bool:
        """Whether it sends to other devices, or waits for data from them."""
        return self.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES

    @property
    def is_free(self) -> bool:
        """Whether it is a custom call that is only a hint to the compiler."""
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
    """A scheduled program as text. Raises ValueError for a text that is not a program."""

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
        """The instructions of a computation, in order."""
        return self._computations[computation]

    def computations(self) -> list[list[Instruction]]:
        """The instructions of all computations."""
        return list(self._computations.values())

    def named_computations(self) -> list[tuple[str, list[Instruction]]]:
        """The names of all computations, with their instructions in order."""
        return list(self._computations.items())

    def find(self, name: str) -> Instruction:
        """The instruction with this name."""
        return self._by_name[name]

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is that of the computation."""
        return self._roots[computation]

    def parameters(self, computation: str) -> dict[int, Instruction]:
        """A computation's parameters, by number."""
        return {int(i.argument): i for i in self.body(computation) if i.opcode == "parameter"}

    def users(self, computation: str, name: str) -> list[Instruction]:
        """The instructions of a computation that use the result of `name`."""
        if computation not in self._users:
            users = self._users[computation] = {}
            for instruction in self._computations[computation]:
                for operand in dict.fromkeys(instruction.operands):
                    users.setdefault(operand, []).append(instruction)
        return self._users[computation].get(name, [])

    def operand_types(self, instruction: Instruction) -> list[str]:
        """The types of an instruction's operands, in order."""
        return [self._by_name[name].type if name in self._by_name else "" for name in instruction.operands]

    def turns(self, loop: Instruction) -> int:
        """The number of iterations of a while loop. Raises ValueError if it can't be read."""
        if known := _TRIP_COUNT.search(loop.rest):
            return int(known[1])
        condition = self._computations[loop.needed("condition")]
        limits = [int(i.argument) for i in condition if i.opcode == "constant" and i.argument.isdigit()]
        if len(limits) != 1:
            raise ValueError(f"while {loop.name}: its trip count can't be read from its condition")
        return limits[0]


def source_of(instruction: Instruction) -> str:
    """The pass, module path and operation, from an instruction's metadata; its opcode if it has none."""
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
