"""--mode=plan: compiles the train step of a config for a TPU topology that need not exist here, and says what it costs.

The real XLA:TPU compiler, in libtpu, runs on any x86 Linux machine. What it is given is `make_train_step`, the function
that train runs, with the shardings that train uses. No accelerator is touched.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import jax
import numpy as np
from etils import epath
from jax.experimental import topologies

from tvq_pod.config.names import check_name
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.files import Unwritten, write_whole
from tvq_pod.parallel.mesh import AXES_MEAN, check_rows, make_mesh, n_row_shards, named_axes, sizes
from tvq_pod.parallel.sharding import batch_sharding
from tvq_pod.planning.chips import CHIPS, Chip
from tvq_pod.planning.flops import train_flops
from tvq_pod.planning.hlo import Program
from tvq_pod.training.step import abstract_train_state, make_train_step

_UNITS = dict(K=2**10, M=2**20, G=2**30, T=2**40)
_TRAVELS = {"all-reduce": 2}  # times that each byte of a collective crosses a chip's links, at most
SHOWN = 15  # of the dearest operations
# libtpu asks the machine it is on for these; planning, there is none. Several processes may plan at once.
LIBTPU_ENVIRONMENT = dict(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_LOG_DIR="disabled",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
)


def plan(settings: Settings, workdir: epath.Path, topology: str, slices: int, tokens: float | None) -> dict:
    """Plans one config: prints the result, writes it to plan.json in `workdir`, and returns it."""
    jax.config.update("jax_platforms", "cpu")  # never a real accelerator
    settings = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, slices=slices))
    chip, devices = topology_devices(topology, slices)
    result = dict(topology=topology, slices=slices) | plan_step(settings, chip, devices)
    if tokens and result.get("predicted_tokens_per_second"):
        result["days"] = tokens / result["predicted_tokens_per_second"] / 86400
    unwritten = Unwritten()
    with unwritten.unless(workdir / "plan.json"):
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "plan.json", json.dumps(result, indent=2) + "\n")
    unwritten.tell()
    print(_text(result, tokens))
    return result


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
    if not importlib.util.find_spec("libtpu"):
        raise UserError(f"--topology={topology}: needs the TPU compiler; pip install -e '.[tpu]'")
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        more = dict(num_slices=slices) if slices > 1 else {}
        if CHIPS[name].is_megacore:
            more["chip_config_name"] = "megacore"
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # whatever libtpu has to say about the shape
        raise UserError(f"--topology={topology}: is no slice that libtpu knows ({str(error)[:200]})") from error
    return CHIPS[name], list(described.devices)


def plan_step(settings: Settings, chip: Chip | None, devices: list) -> dict:
    """Compiles the train step for the devices. See the README for the fields; bytes and cycles are of one device's
    program, per chip where a field's name says so."""
    mesh = make_mesh(settings.mesh, devices)
    train = settings.train
    check_rows(settings, mesh)
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
    result = dict(
        chips=n_chips,
        chip_kind=chip.name if chip else "cpu",
        hosts=len({device.process_index for device in devices}),
        mesh=sizes(mesh),
        axes=AXES_MEAN,
        parameter_count=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        bytes_per_chip={name: size * per_chip for name, size in parts.items()},
        hbm_bytes_per_chip=chip.hbm_bytes if chip else None,
        model_flops_per_step=flops,
        tokens_per_step=train.batch_size * train.update_len,
        versions=versions(),
    )
    began = time.monotonic()
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
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # the compiler's own count knows which arrays are there at the same time; a jax without it gives 0
    peak = memory.peak_memory_in_bytes or held + memory.temp_size_in_bytes
    result["bytes_per_chip"] |= dict(temp=memory.temp_size_in_bytes * per_chip, peak=peak * per_chip)
    result["fits"] = None if chip is None else True  # who knows what memory there is
    if chip is None:
        return result
    program = Program(compiled.as_text())
    cycles = program.cycles()
    seconds = cycles / chip.clock_hz
    by_source = list(program.cycles_by_source().items())
    collectives = program.collectives(named_axes(mesh))
    return result | dict(
        cycles=cycles,
        predicted_step_seconds=seconds,
        predicted_mfu=flops / seconds / (n_chips * chip.peak_flops),
        predicted_tokens_per_second=result["tokens_per_step"] / seconds,
        operations=[dict(source=source, share=own / cycles) for source, own in by_source[:SHOWN]],
        without_estimate=program.without_estimate(),
        collectives=[dataclasses.asdict(collective) for collective in collectives],
        collective_seconds_if_alone=None  # the network between slices is another, and slower by far
        if settings.mesh.slices > 1
        else sum(c.bytes * _TRAVELS.get(c.kind, 1) for c in collectives) * per_chip / chip.ici_bandwidth,
    )


def shortage(message: str) -> tuple[int | None, int | None]:
    """Bytes of a device that are needed, and that are missing, from the compiler's own words; None if they are new."""
    size = r"([\d.]+)([KMGT])"
    for words in (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if total := re.search(words, message):
            needed, there = (float(total[i]) * _UNITS[total[i + 1]] for i in (1, 3))
            excess = re.search(rf"Exceeded hbm capacity by {size}", message)  # rounded less
            return round(needed), round(float(excess[1]) * _UNITS[excess[2]] if excess else needed - there)
    return None, None


def advice(settings: Settings, mesh: jax.sharding.Mesh) -> str:
    """Which settings to change so that a step needs less memory, the one that costs least first."""
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


def abstract_batch(settings: Settings, mesh: jax.sharding.Mesh) -> dict:
    """A batch as ShapeDtypeStructs, as `global_batches` gives it."""
    shape = (settings.train.batch_size, settings.train.update_len)
    dtypes = dict(inputs=np.int32, targets=np.int32, doc_ids=np.int32, loss_mask=np.float32)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for name, dtype in dtypes.items()}


def local_bytes(tree) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs with shardings, without the layout's padding."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def versions() -> dict:
    """Versions of what a plan depends on."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def sweep(flags: list[str], workdir: epath.Path, grid: str) -> None:
    """Plans every point of a grid "config.a=1,2;config.b=3,4", one process each, and prints one table, fastest first.

    flags: the command line without --sweep and --workdir.
    """
    names, points = parse_grid(grid)
    rows, unwritten = [], Unwritten()
    for point in points:
        overrides = [f"--{name}={value}" for name, value in zip(names, point, strict=True)]
        with tempfile.TemporaryDirectory() as draft:  # the workdir may be one that can't be written
            command = [sys.executable, "-m", "tvq_pod.main", *flags, *overrides, f"--workdir={draft}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                rows.append((point, None, last))
                continue
            text = pathlib.Path(draft, "plan.json").read_text()
        rows.append((point, json.loads(text), ""))
        folder = workdir / "sweep" / "_".join(point)
        with unwritten.unless(workdir / "sweep"):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "plan.json", text)
    unwritten.tell()
    rows.sort(key=lambda row: -((row[1] or {}).get("predicted_tokens_per_second") or 0))
    heads = [f"{name.removeprefix('config.'):>18}" for name in names]
    print("  ".join([*heads, "tokens/s", "    MFU", "peak GiB", "fits"]))
    for point, result, message in rows:
        cells = [f"{value:>18}" for value in point]
        if result is None:
            print("  ".join([*cells, message]))
            continue
        speed, mfu = result.get("predicted_tokens_per_second"), result.get("predicted_mfu")
        peak = result["bytes_per_chip"]["peak"]
        cells += [f"{speed:8,.0f}" if speed else f"{'-':>8}", f"{mfu:7.1%}" if mfu else f"{'-':>7}"]
        fits = {True: "yes", False: "no", None: "-"}[result["fits"]]
        cells += [f"{peak / 2**30:8.2f}" if peak else f"{'-':>8}", fits]
        print("  ".join(cells))


def parse_grid(grid: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Names, and all combinations of their values. Raises UserError if the text is no grid, or of no settings."""
    axes = [axis.partition("=") for axis in grid.split(";") if axis.strip()]
    good = all(name.strip().startswith("config.") and all(values.split(",")) for name, _, values in axes)
    if not (axes and good):
        raise UserError(f'--sweep={grid}: must be like "config.model.block_len=256,512;config.train.update_len=2048"')
    for name, _, _ in axes:
        check_name(name.strip())
    return [name.strip() for name, _, _ in axes], list(itertools.product(*(values.split(",") for _, _, values in axes)))


def _text(result: dict, tokens: float | None) -> str:
    gib = 2**30
    lines = [
        f"{result['topology']}: {result['chips']} {result['chip_kind']} chips on {result['hosts']} hosts, "
        f"mesh {result['mesh']}, {result['parameter_count']:,} parameters, "
        f"compiled in {result['compile_seconds']:.0f} s",
        "GiB a chip: "
        + ", ".join(f"{name} {size / gib:.3f}" for name, size in result["bytes_per_chip"].items() if size is not None)
        + (f", of {result['hbm_bytes_per_chip'] / gib:.0f}" if result["hbm_bytes_per_chip"] else ""),
    ]
    if result["fits"] is False:
        short = result["short_by_bytes"]
        by = f" by {short / gib:.2f} GiB a device" if short else ""
        lines += [f"does not fit{by}: {result['lack']}", f"what would help: {result['advice']}"]
    if "predicted_step_seconds" in result:
        lines.append(
            f"predicted: {result['predicted_step_seconds'] * 1e3:.2f} ms a step, MFU {result['predicted_mfu']:.1%}, "
            f"{result['predicted_tokens_per_second']:,.0f} tokens/s"
        )
        if "days" in result:
            lines.append(f"{tokens:.3g} tokens: {result['days']:.2f} days")
        lines += ["share of cycles:"] + [f"  {row['share']:6.1%}  {row['source']}" for row in result["operations"]]
        if result["without_estimate"]:
            lines.append(
                "not in the estimate: " + ", ".join(f"{n} x {s}" for s, n in result["without_estimate"].items())
            )
        alone = result["collective_seconds_if_alone"]
        took = f", {alone * 1e3:.2f} ms at the links' full speed" if alone is not None else ""
        lines += [f"collectives a step and device{took}:"] + [
            f"  {row['kind']:<18} {row['count']:>6} {row['bytes'] / 2**20:>12,.2f} MiB  over {', '.join(row['axes'])}"
            for row in result["collectives"]
        ]
    return "\n".join(lines)
