"""Flags of the TPU compiler and runtime that a run on each kind of chip is started with, each with its reason.

They reach libtpu by LIBTPU_INIT_ARGS, and what they do to a step, by the compiler's own estimate, is seen with the same
variable in the environment of `--mode=plan`. libtpu ends a process that gives it a flag it does not know.
"""


def flags(chip: str, several_slices: bool) -> list[str]:
    """As --name=value, for a chip by its name in a topology."""
    return []
