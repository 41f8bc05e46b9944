"""What can be asked for: a slice, by gcloud's name of its type; and which names it takes: gcloud does not look."""

import dataclasses
import re

from tvq_pod.errors import UserError
from tvq_pod.planning.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice, of so many chips. How many machines it has, only gcloud knows, once it is there."""

    accelerator: str
    chip: Chip
    chips: int


def parse(accelerator: str) -> Slice:
    """Of gcloud's name, as v5litepod-16 (16 chips) or v5p-16 (16 cores, 8 chips). Raises UserError."""
    kinds = {chip.accelerator: chip for chip in CHIPS.values()}
    kind, _, number = accelerator.rpartition("-")
    example = "as v5litepod-16, v5p-128 or v6e-256"
    if kind not in kinds:
        raise UserError(f"--accelerator={accelerator}: must be one of {', '.join(kinds)} with a number, {example}")
    chip = kinds[kind]
    if not re.fullmatch(r"[1-9][0-9]{0,4}", number) or int(number) % chip.per_name:
        what = "cores, two a chip" if chip.per_name > 1 else "chips"
        raise UserError(f"--accelerator={accelerator}: behind {kind}- must be a number of {what}, {example}")
    return Slice(accelerator, chip, int(number) // chip.per_name)


def check_name(name: str | None) -> str:
    """Raises UserError if it can't be a queued resource's and its nodes' name."""
    if not name:
        raise UserError("--name=: must be given: the run's name, and that of its slice")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"--name={name}: must be 1 to 40 of a-z, 0-9 and -, begin with a letter and not end with -")
    return name


def check_value(flag: str, value: str, pattern: str, example: str) -> str:
    """Raises UserError unless all of it matches."""
    if not re.fullmatch(pattern, value):
        raise UserError(f"--{flag}={value}: must look like {example}")
    return value
