"""Flags of the TPU compiler and runtime that a run is started with, by kind of chip, each with its reason.

They reach libtpu by LIBTPU_INIT_ARGS; what they do to a step, by the compiler's own estimate, is seen with the same
variable in the environment of `--mode=plan`. libtpu ends a process that gives it a flag it does not know, so every flag
here is tried by the tests. docs/launch.md has the flags that were tried and are not here, and what they would cost.
"""

# Only gradients cross slices, over the data center's network, which is slow.
SEVERAL_SLICES = {
    # All-reduces of gradients run beside the rest of the backward pass, where nothing waits for them yet.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    # Also where the arrays that are summed together differ in size, as parameters do.
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

BY_CHIP = {"v2": {}, "v3": {}, "v4": {}, "v5e": {}, "v5p": {}, "v6e": {}, "tpu7x": {}}


def flags(chip: str, several_slices: bool) -> list[str]:
    """As --name=value, for a chip by its name in a topology."""
    chosen = BY_CHIP[chip] | (SEVERAL_SLICES if several_slices else {})
    return [f"--{name}={value}" for name, value in chosen.items()]
