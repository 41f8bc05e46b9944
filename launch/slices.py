"""Slices that can be requested, by gcloud's name of their type, and checks of names, which gcloud itself does not
make."""

import dataclasses
import re

from tvq_pod.errors import UserError
from tvq_pod.planning.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice and its number of chips. Only gcloud knows how many machines it has, once it exists."""

    accelerator: str
    chip: Chip
    chips: int


def parse(accelerator: str) -> Slice:
    """Parses gcloud's name of a type, such as v5litepod-16 (16 chips) or v5p-16 (16 cores, 8 chips). Raises
    UserError."""
    kinds = {chip.accelerator: chip for chip in CHIPS.values()}
    kind, _, number = accelerator.rpartition("-")
    example = "such as v5litepod-16, v5p-128 or v6e-256"
    if kind not in kinds:
        known = f"{', '.join(kinds)} with a number, {example}"
        raise UserError(f"--accelerator={accelerator}: is not a type of TPU slice; give one of {known}")
    chip = kinds[kind]
    if not re.fullmatch(r"[1-9][0-9]{0,4}", number) or int(number) % chip.per_name:
        what = "cores, two per chip" if chip.per_name > 1 else "chips"
        raise UserError(f"--accelerator={accelerator}: {number!r} is not a number of {what}; give one, {example}")
    return Slice(accelerator, chip, int(number) // chip.per_name)


def check_name(name: str | None) -> str:
    """Returns the name. Raises UserError if a queued resource and its nodes cannot have it."""
    if not name:
        raise UserError("--name=: is missing; give a name for the run and its slice")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        rule = "1 to 40 of a-z, 0-9 and -, starting with a letter and not ending with -"
        raise UserError(f"--name={name}: is not a valid name; give {rule}")
    return name


def check_value(flag: str, value: str, pattern: str, example: str) -> str:
    """Returns the value. Raises UserError unless the pattern matches all of it."""
    if not re.fullmatch(pattern, value):
        raise UserError(f"--{flag}={value}: is not valid; give a value like {example}")
    return value
