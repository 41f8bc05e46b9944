"""The table of TPU chips.

Sources. HBM, peak bf16 FLOP/s, HBM and ICI bandwidth: the per-generation pages of Google's TPU documentation
(cloud.google.com/tpu/docs/v4 ... /v6e, /tpu7x); for v2 and v3 Jouppi et al., Ten Lessons From Three Generations, ISCA
2021. Operations a cycle: what XLA's own cost model reaches on a large bf16 matmul compiled for each generation lies
between 70 and 98% of the powers of two given here. Clock: peak over operations a cycle; for v2, v3 and v4 that gives
the 700, 940 and 1050 MHz that are published (the same paper, and arXiv 2304.01433).
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of chips. All figures are for a chip, except flops_per_cycle."""

    name: str  # as in a topology, "v5e:4x4"
    accelerator: str  # gcloud's name for a slice's type, before the dash
    hbm_bytes: int
    peak_flops: float  # bf16, per second
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second, all links, one way
    devices: int  # as jax sees them: two cores may be one device
    dimensions: int  # of a slice's shape
    flops_per_cycle: int  # bf16, of one device
    per_name: int  # what "v5p-16" counts for each chip: its cores, or 1
    runtime_version: str  # gcloud's name for the image that its machines boot

    @property
    def is_megacore(self) -> bool:
        """Whether two cores are one device only on request."""
        return self.name == "v4"

    @property
    def clock_hz(self) -> float:
        """Cycles per second."""
        return self.peak_flops / (self.devices * self.flops_per_cycle)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", "v2", 16 * GIB, 45.9e12, 0.7e12, 0.248e12, 2, 2, 2**15, 2, "tpu-ubuntu2204-base"),
        Chip("v3", "v3", 32 * GIB, 123.2e12, 0.9e12, 0.328e12, 2, 2, 2**16, 2, "tpu-ubuntu2204-base"),
        Chip("v4", "v4", 32 * GIB, 275e12, 1.2e12, 0.3e12, 1, 3, 2**18, 2, "tpu-ubuntu2204-base"),
        Chip("v5e", "v5litepod", 16 * GIB, 197e12, 0.819e12, 0.2e12, 1, 2, 2**17, 1, "v2-alpha-tpuv5-lite"),
        Chip("v5p", "v5p", 95 * GIB, 459e12, 2.765e12, 0.6e12, 1, 3, 2**18, 2, "v2-alpha-tpuv5"),
        Chip("v6e", "v6e", 32 * GIB, 918e12, 1.638e12, 0.4e12, 1, 2, 2**19, 1, "v2-alpha-tpuv6e"),
        Chip("tpu7x", "tpu7x", 192 * GIB, 2307e12, 7.38e12, 0.6e12, 2, 3, 2**19, 2, "v2-alpha-tpu7-ubuntu2404"),
    )
}

# jax's device kind for each name, from topologies of jax 0.10.2 with libtpu 0.0.42.1.
DEVICE_KINDS = {
    "v2": "TPU v2",
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}
