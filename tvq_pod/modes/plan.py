"""--mode=plan: predicting the cost of a config on a TPU slice or, with --sweep, of a grid of settings."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
from etils import epath

from tvq_pod.config.names import check_name
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.files import Unwritten, write_whole
from tvq_pod.planning.cost import plan_step, topology_devices

_SHOWN_WITHOUT = 5  # operations without an estimate or without bundles; plan.json has all


def plan(settings: Settings, workdir: epath.Path, topology: str, slices: int, tokens: float | None) -> dict:
    """Plans one config: prints the result, writes it to plan.json in `workdir`, and returns it."""
    jax.config.update("jax_platforms", "cpu")  # never a real accelerator
    settings = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, slices=slices))
    chip, devices = topology_devices(topology, slices)
    result: dict[str, Any] = dict(topology=topology, slices=slices) | plan_step(settings, chip, devices)
    if tokens and result.get("predicted_tokens_per_second"):
        result["days"] = tokens / result["predicted_tokens_per_second"] / 86400
    unwritten = Unwritten()
    with unwritten.unless(workdir / "plan.json"):
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "plan.json", json.dumps(result, indent=2) + "\n")
    unwritten.tell()
    print(_text(result, tokens))
    return result


def sweep(flags: list[str], workdir: epath.Path, grid: str) -> None:
    """Plans every point of a grid "config.a=1,2;config.b=3,4" in its own process, and prints a table, fastest first.

    flags: the command line without --sweep and --workdir.
    """
    names, points = parse_grid(grid)
    rows, unwritten = [], Unwritten()
    for point in points:
        overrides = [f"--{name}={value}" for name, value in zip(names, point, strict=True)]
        with tempfile.TemporaryDirectory() as draft:  # the workdir may be read-only
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
    print("  ".join([*heads, "tokens/s", "    MFU", "roofline", "peak GiB", "fits"]))
    for point, result, message in rows:
        cells = [f"{value:>18}" for value in point]
        if result is None:
            print("  ".join([*cells, message]))
            continue
        speed, mfu = result.get("predicted_tokens_per_second"), result.get("predicted_mfu")
        roofline = result.get("roofline_mfu")
        peak = result["bytes_per_chip"]["peak"]
        cells += [f"{speed:8,.0f}" if speed else f"{'-':>8}", f"{mfu:7.1%}" if mfu else f"{'-':>7}"]
        cells += [f"{roofline:8.1%}" if roofline else f"{'-':>8}"]
        fits = {True: "yes", False: "no", None: "-"}[result["fits"]]
        cells += [f"{peak / 2**30:8.2f}" if peak else f"{'-':>8}", fits]
        print("  ".join(cells))


def parse_grid(grid: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Returns names, and all combinations of their values. Raises UserError if the text is not a grid of settings."""
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
        result["attention"],
        "GiB a chip: "
        + ", ".join(f"{name} {size / gib:.3f}" for name, size in result["bytes_per_chip"].items() if size is not None)
        + (f", of {result['hbm_bytes_per_chip'] / gib:.0f}" if result["hbm_bytes_per_chip"] else ""),
    ]
    if result["fits"] is False:
        short = result["short_by_bytes"]
        by = f" by {short / gib:.2f} GiB a device" if short else ""
        lines += [f"does not fit{by}: {result['lack']}", f"what would help: {result['advice']}"]
    if "predicted_step_seconds" in result:
        for name, key in (("the compiler's estimate", "predicted"), ("roofline", "roofline")):
            seconds, mfu, speed = (result[f"{key}_{field}"] for field in ("step_seconds", "mfu", "tokens_per_second"))
            lines.append(f"{name}: {seconds * 1e3:.2f} ms a step, MFU {mfu:.1%}, {speed:,.0f} tokens/s")
        if "days" in result:
            lines.append(f"{tokens:.3g} tokens: {result['days']:.2f} days by the estimate")
        bounds = ", ".join(f"{name} {share:.0%}" for name, share in result["roofline_bounds"].items())
        lines.append(f"the roofline is bound by: {bounds}")
        rows = {row["source"]: row for row in (*result["operations"], *result["roofline_operations"])}.values()
        lines.append("share of the estimate, of the roofline, and what bounds it there:")
        for row in sorted(rows, key=lambda row: -max(row["share"], row["roofline_share"])):
            share, roofline = row["share"], row["roofline_share"]
            lines.append(f"  {share:6.1%} {roofline:6.1%}  {row['bound'] or '':<8} {row['source']}")
        for name, key in (("not in the estimate", "without_estimate"), ("bundles not known", "without_bundles")):
            if rows := [f"{n} x {source}" for source, n in result[key].items()]:
                more = [f"and {len(rows) - _SHOWN_WITHOUT} more"] if len(rows) > _SHOWN_WITHOUT else []
                lines.append(f"{name}: " + ", ".join(rows[:_SHOWN_WITHOUT] + more))
        alone = result["collective_seconds_if_alone"]
        took = f", {alone * 1e3:.2f} ms at the links' full speed" if alone is not None else ""
        lines += [f"collectives a step and device{took}:"] + [
            f"  {row['kind']:<18} {row['count']:>6} {row['bytes'] / 2**20:>12,.2f} MiB  over {', '.join(row['axes'])}"
            for row in result["collectives"]
        ]
    return "\n".join(lines)
