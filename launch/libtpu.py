"""Flags of the TPU compiler and runtime that a run is started with, by kind of chip, each with its reason.

They reach libtpu through LIBTPU_INIT_ARGS; the same variable in the environment of `--mode=plan` shows their effect on
a step by the compiler's own estimate. libtpu ends a process that gives it an unknown flag, so the tests try every flag
here. docs/launch.md lists the flags that were tried and are not used here, and what they would cost.
"""

# Only gradients cross slices, over the slow network of the data center.
SEVERAL_SLICES = {
    # All-reduces of gradients overlap with the rest of the backward pass, when nothing waits for them yet.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    # Also if the arrays that are summed together differ in size, as parameters do.
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

BY_CHIP = {"v2": {}, "v3": {}, "v4": {}, "v5e": {}, "v5p": {}, "v6e": {}, "tpu7x": {}}


def flags(chip: str, several_slices: bool) -> list[str]:
    """Returns flags as --name=value, for a chip by its name in a topology."""
    chosen = BY_CHIP[chip] | (SEVERAL_SLICES if several_slices else {})
    return [f"--{name}={value}" for name, value in chosen.items()]
