"""Array types as XLA prints them: their size in bytes, and the memory that they are in."""

import dataclasses
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_TILE = re.compile(r"\(([\d,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32,
         "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64, "c128": 128}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array type, for example bf16[8,512]{1,0:T(8,128)(2,1)S(1)}."""

    dtype: str
    dims: tuple[int, ...]
    padded: tuple[int, ...]  # padded to the layout's tiles, in the same order
    space: int  # memory space; 0 is HBM, 1 VMEM

    @property
    def bytes(self) -> int:
        """The size without padding."""
        return math.prod(self.dims) * _bits(self.dtype) // 8

    @property
    def held_bytes(self) -> int:
        """The size with the padding of the layout's tiles, which is stored and moved, too."""
        return math.prod(self.padded) * _bits(self.dtype) // 8

    @property
    def hbm_bytes(self) -> int:
        """The bytes that moving it to or from HBM transfers: none if it is in another memory."""
        return self.held_bytes if self.space == 0 else 0


def _bits(dtype: str) -> int:
    """Bits of a number; 0 for types without numbers, such as tokens."""
    return _BITS.get(dtype, 8 if dtype.startswith("f8") else 0)


def arrays(type_: str) -> list[Array]:
    """All arrays in a type; for a tuple, those of its parts in order."""
    return list(_arrays(type_))


def _arrays(type_: str) -> Iterator[Array]:
    for dtype, listed, order, layout in _ARRAY.findall(type_):
        dims = tuple(int(n) for n in listed.split(",") if n)
        padded = list(dims)
        minor_first = [int(n) for n in order.split(",") if n]
        tile = _TILE.search(layout.partition("T")[2]) if "T(" in layout else None
        if tile and len(minor_first) == len(dims):
            sizes = [int(n) if n.isdigit() else 1 for n in tile[1].split(",")]
            for place, size in zip(minor_first, reversed(sizes), strict=False):
                padded[place] = -(-padded[place] // size) * size
        space = _SPACE.search(layout)
        yield Array(dtype, dims, tuple(padded), int(space[1]) if space else 0)


def top_level(type_: str) -> list[str]:
    """The parts of a tuple type, "(f32[2]{0:T(8)}, (s32[], s32[]))"; for any other type, the type itself."""
    if not type_.startswith("("):
        return [type_]
    parts, depth = [""], 0
    for letter in type_[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
