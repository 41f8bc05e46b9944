"""The cost of one training step, from the real compiler, for a topology that need not exist here.

The XLA:TPU compiler, in libtpu, runs on any x86 Linux machine. It compiles `make_train_step`, the function that train
runs, with the shardings that train uses. No accelerator is used.
"""

import dataclasses
import os
import re
import time
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require
from tvq_pod.parallel.attention import attention_line, check_attention
from tvq_pod.parallel.mesh import AXES_MEAN, check_rows, make_mesh, n_row_shards, named_axes, sizes
from tvq_pod.planning.chips import CHIPS, Chip
from tvq_pod.planning.flops import train_flops
from tvq_pod.planning.hlo import Peak, Program
from tvq_pod.planning.module import Module
from tvq_pod.planning.roofline import Roofline, with_schedules
from tvq_pod.planning.schedules import Dumps
from tvq_pod.training.step import abstract_batch, abstract_train_state, make_train_step

_UNITS = dict(K=2**10, M=2**20, G=2**30, T=2**40)
_TRAVELS = {"all-reduce": 2}  # how often each byte of a collective crosses a chip's links, at most
SHOWN = 15  # most expensive operations
# libtpu asks the machine that it runs on for these; when planning there is none. Several processes may plan at once.
LIBTPU_ENVIRONMENT = dict(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_LOG_DIR="disabled",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
)
_DUMPS = Dumps()


def topology_devices(topology: str, slices: int) -> tuple[Chip | None, list]:
    """The chip and the devices of "v5e:4x4" (TPU) or "cpu:8" (simulated here; no chip).

    Raises UserError if there is no such topology, or libtpu is missing.
    """
    name, _, shape = topology.partition(":")
    if name == "cpu":
        if not shape.isdigit() or not int(shape):
            raise UserError(f"--topology={topology}: must name a number of devices, as cpu:8 does")
        jax.config.update("jax_num_cpu_devices", int(shape))
        return None, jax.devices()
    if name not in CHIPS:
        raise UserError(f"--topology={topology}: must begin with one of {', '.join(CHIPS)}, cpu, as v5e:4x4 does")
    example = "x".join("2" * CHIPS[name].dimensions)
    if not re.fullmatch(r"\d+" + r"x\d+" * (CHIPS[name].dimensions - 1), shape):
        raise UserError(f"--topology={topology}: must give the slice's shape in chips, as {name}:{example} does")
    require("libtpu", f"--topology={topology}: the TPU compiler")
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    more: dict[str, Any] = dict(num_slices=slices) if slices > 1 else {}
    if CHIPS[name].is_megacore:
        more["chip_config_name"] = "megacore"
    with _DUMPS.asked_for():
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
        except Exception as error:  # libtpu's own errors about the shape
            raise UserError(f"--topology={topology}: is not a slice that libtpu knows ({str(error)[:200]})") from error
    return CHIPS[name], list(described.devices)


def plan_step(settings: Settings, chip: Chip | None, devices: list) -> dict:
    """Compiles the train step for the devices. See docs/plan.md for the fields; bytes and cycles are those of one
    device's program, or per chip if a field's name says so."""
    mesh = make_mesh(settings.mesh, devices)
    train = settings.train
    check_rows(settings, mesh)
    check_attention(settings.model, mesh)
    state = abstract_train_state(settings, mesh)
    batch = abstract_batch(settings, mesh)
    per_chip = chip.devices if chip else 1
    n_chips = len(devices) // per_chip
    flops = train_flops(settings.model, train.batch_size * train.update_len, train.update_len)
    parts = dict(
        parameters=local_bytes(state.params),
        optimizer=local_bytes(state.opt_state),
        recurrent_state=local_bytes(state.recurrent),
        batch=local_bytes(batch),
    )
    if state.ema is not None:
        parts["weights_average"] = local_bytes(state.ema)
    result: dict[str, Any] = dict(
        chips=n_chips,
        chip_kind=chip.name if chip else "cpu",
        hosts=len({device.process_index for device in devices}),
        mesh=sizes(mesh),
        axes=AXES_MEAN,
        attention=attention_line(settings.model, mesh),
        parameter_count=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        bytes_per_chip={name: size * per_chip for name, size in parts.items()},
        hbm_bytes_per_chip=chip.hbm_bytes if chip else None,
        model_flops_per_step=flops,
        tokens_per_step=train.batch_size * train.update_len,
        versions=versions(),
    )
    began = time.monotonic()
    _DUMPS.discard()
    try:
        compiled = make_train_step(settings, mesh).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        needed, short = shortage(str(error))
        result["bytes_per_chip"] |= dict(temp=None, peak=needed and needed * per_chip)
        return result | dict(
            fits=False,
            compile_seconds=time.monotonic() - began,
            lack=" ".join(str(error).split())[:400],
            short_by_bytes=short,
            advice=advice(settings, mesh),
        )
    result["compile_seconds"] = time.monotonic() - began
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA knows the memory of its programs"
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # the compiler's own count takes into account which arrays exist at the same time; a jax without it gives 0
    peak = memory.peak_memory_in_bytes or held + memory.temp_size_in_bytes
    result["bytes_per_chip"] |= dict(temp=memory.temp_size_in_bytes * per_chip, peak=peak * per_chip)
    result["fits"] = None if chip is None else True  # without a chip the memory is unknown
    if chip is None:
        return result
    cost = cost_of(compiled, chip)
    collectives = cost.program.collectives(named_axes(mesh))
    tokens = result["tokens_per_step"]
    predicted = {
        name + key: value
        for name, cycles in (("predicted_", cost.program.cycles()), ("roofline_", cost.roofline.cycles))
        for key, value in _speed(cycles / chip.clock_hz, flops / (n_chips * chip.peak_flops), tokens).items()
    }
    return result | dict(
        cycles=cost.program.cycles(),
        **predicted,
        **cost.shares(),
        without_estimate=cost.program.without_estimate(),
        without_bundles=cost.roofline.without_bundles(),
        kernels=cost.kernels(),
        hbm_traffic_bytes_per_chip=cost.roofline.hbm_bytes * per_chip,
        collectives=[dataclasses.asdict(collective) for collective in collectives],
        collective_seconds_if_alone=None  # the network between slices is a different one, and far slower
        if settings.mesh.slices > 1
        else sum(c.bytes * _TRAVELS.get(c.kind, 1) for c in collectives) * per_chip / chip.ici_bandwidth,
    )


def _speed(seconds: float, seconds_at_peak: float, tokens: int) -> dict[str, float]:
    return dict(step_seconds=seconds, mfu=seconds_at_peak / seconds, tokens_per_second=tokens / seconds)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a compiled program by both measures: the compiler's own estimate of cycles, and the roofline."""

    program: Program
    roofline: Roofline
    peak: Peak

    def shares(self) -> dict[str, Any]:
        """The most expensive operations by each measure, with their shares by both; and what bounds the roofline."""
        total, floor = self.program.cycles(), self.roofline.cycles
        by_source, by_roofline = self.program.cycles_by_source(), self.roofline.cycles_by_source()
        bounds = self.roofline.bounds()

        def row(source: str) -> dict[str, Any]:
            share, roofline_share = by_source.get(source, 0) / total, by_roofline.get(source, 0) / floor
            return dict(source=source, share=share, roofline_share=roofline_share, bound=bounds.get(source))

        return dict(
            operations=[row(source) for source in list(by_source)[:SHOWN]],
            roofline_operations=[row(source) for source in list(by_roofline)[:SHOWN]],
            roofline_bounds={bound: cycles / floor for bound, cycles in self.roofline.cycles_by_bound().items()},
        )

    def kernels(self) -> list[dict[str, Any]]:
        """The hand-written kernels: how often each runs in a step, and for one run the scheduled bundles, the cycles of
        its matmuls at the peak, and those of its traffic at the full bandwidth."""
        return [
            dict(
                source=operation.source,
                times=operation.times,
                bundles=operation.count.cycles if operation.count else None,
                matmul_cycles=operation.flops / self.peak.flops,
                hbm_cycles=operation.hbm_bytes / self.peak.hbm_bytes,
            )
            for operation in self.roofline.operations
            if operation.instruction.opcode == "custom-call"
        ]


def cost_of(compiled: jax.stages.Compiled, chip: Chip) -> Cost:
    """The cost of the program that was compiled last, for devices of `topology_devices`. It has no bundles if something
    else in this process used libtpu before the first call of that function."""
    text = compiled.as_text()
    assert text is not None, "XLA prints its programs"
    peak = Peak(chip.flops_per_cycle, chip.hbm_bandwidth / chip.devices / chip.clock_hz)
    module = Module(text)
    program = Program(module, peak, _DUMPS.take(with_schedules(module)))
    return Cost(program, Roofline(program, peak), peak)


def shortage(message: str) -> tuple[int | None, int | None]:
    """The bytes that a device needs and lacks, from the compiler's error message; None if its format is unknown."""
    size = r"([\d.]+)([KMGT])"
    for words in (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if total := re.search(words, message):
            needed, there = (float(total[i]) * _UNITS[total[i + 1]] for i in (1, 3))
            excess = re.search(rf"Exceeded hbm capacity by {size}", message)  # less rounded
            return round(needed), round(float(excess[1]) * _UNITS[excess[2]] if excess else needed - there)
    return None, None


def advice(settings: Settings, mesh: jax.sharding.Mesh) -> str:
    """The settings to change so that a step needs less memory, the cheapest first."""
    rows = settings.train.batch_size // n_row_shards(mesh)
    parts = settings.train.microbatches
    return ", or ".join(
        [
            *(["config.model.remat=full"] if settings.model.remat != "full" else []),
            *([f"config.train.microbatches={2 * parts}"] if rows % (2 * parts) == 0 else []),
            *([f"config.train.batch_size={settings.train.batch_size // 2}"] if rows > 1 else []),
            f"config.train.update_len={max(settings.train.update_len // 2, settings.model.block_len)}",
            "a slice of more chips",
        ]
    )


def local_bytes(tree) -> int:
    """The bytes of one device's part of a tree of ShapeDtypeStructs with shardings, without the layout's padding."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def versions() -> dict:
    """The versions of the packages that a plan depends on."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
