"""The work of an operation: the bytes that it moves to and from HBM, and the arithmetic of its matmuls.

An array in HBM counts with the padding of its tiles. A fusion that slices an operand reads only the slices; one that
updates a slice of an operand in place writes only the slice. Arrays in VMEM (S(1) in a layout) are not moved.

Traffic between chips is not counted. libtpu splits a collective over the fusions that run while it sends: each takes
the collective's buffers, runs one step of the collective beside its own work, and returns the same buffers. These
buffers are often much larger than the fusion's own data, and it does not move them.
"""

import dataclasses
import math
import re

from tvq_pod.planning.arrays import arrays, top_level
from tvq_pod.planning.hlo import cost_estimate
from tvq_pod.planning.module import Instruction, Module

# transfers that overlap with other operations
STARTS, ENDS = ("copy-start", "slice-start", "dynamic-slice-start"), ("copy-done", "slice-done", "dynamic-slice-done")
_RENAMES = ("bitcast", "reshape")
_SLICES = ("slice", "dynamic-slice", "gather")
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "call", "conditional", "iota"),
)
_ALIASING = re.compile(r"output_to_operand_aliasing=\{((?:\{\d*\}: \(\d+, \{\}\)(?:, )?)+)\}")
_ALIASED = re.compile(r"\{(\d*)\}: \(")
_WINDOW = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)")

_Dims = tuple[int, ...]


def is_free(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction takes no time of its own here: it only renames an array, or it sends to other devices."""
    opcode = instruction.opcode
    if opcode in (*_FREE, *STARTS) or instruction.is_free or instruction.is_collective:
        return True
    if opcode.endswith(("-done", "-update")) and opcode not in ENDS:  # an operation counts where it is started
        return True
    return instruction.opcode == "fusion" and _only_sends(module, instruction)


def synchronous(instruction: Instruction) -> Instruction:
    """The operation that an instruction such as fusion-start starts; any other instruction unchanged."""
    if not instruction.opcode.endswith("-start"):
        return instruction
    _, result, *_ = top_level(instruction.type)  # its operands, its result, and what else it needs
    return dataclasses.replace(instruction, opcode=instruction.opcode.removesuffix("-start"), type=result)


def _only_sends(module: Module, fusion: Instruction) -> bool:
    callee = fusion.called("calls")
    sends = callee is not None and any(inner.is_collective for inner in module.body(callee))
    return sends and not matmul_flops(module, fusion)


def moved_bytes(module: Module, instruction: Instruction) -> int:
    """The bytes that an instruction moves to and from HBM. For a hand-written kernel, those that its author states,
    less those already in VMEM; if none are stated, each operand and each result once."""
    if is_free(module, instruction):
        return 0
    results = arrays(instruction.type)
    operands = [arrays(type_) for type_ in module.operand_types(instruction)]
    if stated := cost_estimate(instruction):
        given = [array for of_operand in (*operands, results) for array in of_operand]
        in_vmem = sum(array.held_bytes for array in given if array.space != 0)
        return max(stated[1] - in_vmem, 0)
    written = sum(array.hbm_bytes for array in results)
    size = sum(array.held_bytes for array in results)
    if instruction.opcode in ENDS:  # only its start says where it comes from
        start = module.find(instruction.operands[0])
        source = arrays(top_level(start.type)[1 if start.opcode == "copy-start" else 0])[0]
        return size * (source.space == 0) + written
    if instruction.opcode == "fusion":
        return _moved_by_fusion(module, instruction)
    if instruction.opcode in _SLICES:
        return size * (operands[0][0].space == 0) + written
    if instruction.opcode == "dynamic-update-slice":
        update = operands[1][0]
        return update.hbm_bytes + (update.held_bytes if written else 0)
    return sum(array.hbm_bytes for of_operand in operands for array in of_operand) + written


def _moved_by_fusion(module: Module, fusion: Instruction) -> int:
    callee = fusion.needed("calls")
    parameters = module.parameters(callee)
    types = module.operand_types(fusion)
    returned = _aliased(fusion)
    read = sum(_read(module, callee, parameters[n].name, _hbm_bytes(type_), returned) for n, type_ in enumerate(types))
    return read + _written(module, callee, top_level(fusion.type), returned)


def _aliased(fusion: Instruction) -> frozenset[int]:
    """The indices of the results that share an operand's memory."""
    listed = _ALIASING.search(fusion.attributes)
    return frozenset(int(place or 0) for place in _ALIASED.findall(listed[1])) if listed else frozenset()


def _hbm_bytes(type_: str) -> int:
    return sum(array.hbm_bytes for array in arrays(type_))


def _read(module: Module, computation: str, name: str, whole: int, aliased: frozenset[int] = frozenset()) -> int:
    """The bytes that a fusion reads of an operand with `whole` bytes in HBM: only the slices of an operand that it
    slices; nothing of one that it updates in place, sends, or returns as one of the `aliased` results."""
    total = 0
    for user in module.users(computation, name) if whole else []:
        places = [n for n, operand in enumerate(user.operands) if operand == name]
        if user.opcode in _RENAMES:
            total += _read(module, computation, user.name, whole)
        elif user.opcode in _SLICES and places == [0]:
            total += sum(array.held_bytes for array in arrays(user.type))
        elif user.opcode == "fusion":
            callee = user.needed("calls")
            total += sum(_read(module, callee, module.parameters(callee)[n].name, whole) for n in places)
        elif user.is_collective or (user.opcode == "tuple" and aliased.issuperset(places)):
            continue
        elif user.opcode != "dynamic-update-slice" or places != [0]:
            return whole
    return min(total, whole)


def _written(module: Module, computation: str, types: list[str], aliased: frozenset[int] = frozenset()) -> int:
    """The bytes that a fusion with results of `types` writes to HBM: only the update of an operand that it updates in
    place; nothing of one that it sends, or that it returns as one of the `aliased` results."""
    root = module.root(computation)
    parts = [module.find(name) for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(types):  # its root has several results of its own
        return sum(_hbm_bytes(type_) for type_ in types)
    total = 0
    for place, (renamed, type_) in enumerate(zip(parts, types, strict=True)):
        part, whole = _unrenamed(module, renamed), _hbm_bytes(type_)
        if part.is_collective or (part.opcode == "parameter" and place in aliased):
            continue
        if part.opcode == "fusion" and not part.type.startswith("("):
            total += _written(module, part.needed("calls"), [type_])
        elif part.opcode == "dynamic-update-slice":
            updated = _unrenamed(module, module.find(part.operands[0]))
            update = sum(array.held_bytes for array in arrays(module.operand_types(part)[1]))
            total += min(whole, update) if updated.opcode == "parameter" else whole
        else:
            total += whole
    return total


def _unrenamed(module: Module, instruction: Instruction) -> Instruction:
    while instruction.opcode in _RENAMES:
        instruction = module.find(instruction.operands[0])
    return instruction


def matmul_flops(module: Module, instruction: Instruction) -> int:
    """The operations of the matmuls in an instruction, where a multiply-add is two; for a kernel, those that its author
    states."""
    if stated := cost_estimate(instruction):
        return stated[0]
    if instruction.opcode == "fusion":
        return sum(matmul_flops(module, inner) for inner in module.body(instruction.needed("calls")))
    if instruction.opcode not in ("convolution", "dot"):
        return 0
    left, right = (arrays(type_)[0].dims for type_ in module.operand_types(instruction))
    result = arrays(instruction.type)[0].dims
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        places = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2 * math.prod(result) * math.prod(left[n] for n in places)
    return 2 * _convolved(instruction, left, right, result)


def _convolved(instruction: Instruction, left: _Dims, right: _Dims, result: _Dims) -> int:
    """The multiplications of a convolution. XLA writes the batch of a matmul as an axis of the convolution in which
    most positions of the kernel meet padding; these don't count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        raise ValueError(f"convolution {instruction.name}: it has no dim_labels")
    on_left, on_right, on_result = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    settings = {key: value.split("x") for key, value in _WINDOW.findall(window[1] if window else "")}
    products = result[on_result.index("b")] * result[on_result.index("f")] * right[on_right.index("i")]
    for axis in sorted(set(on_result) - {"b", "f"}):
        own = {key: values[int(axis)] for key, values in settings.items()}
        sizes = left[on_left.index(axis)], right[on_right.index(axis)], result[on_result.index(axis)]
        products *= _met(*sizes, own)
    return products


def _met(left: int, right: int, result: int, window: dict[str, str]) -> int:
    """The number of pairs of a kernel position and a result position that meet an input, along one axis."""
    stride, apart, dilated = (int(window.get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    met = 0
    for place in range(result):
        first = place * stride - before
        met += sum(at % apart == 0 and 0 <= at < left * apart for at in range(first, first + right * dilated, dilated))
    return met
