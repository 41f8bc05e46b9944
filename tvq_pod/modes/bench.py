"""--mode=bench: measuring a config's steps on the available devices, also against quadratic attention."""

import dataclasses
import io
import json
from typing import Any

import jax
from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require
from tvq_pod.host.files import Unwritten, write_whole
from tvq_pod.host.terminal import say
from tvq_pod.parallel.attention import with_tried_attention
from tvq_pod.parallel.mesh import check_rows, make_mesh
from tvq_pod.planning.measured import measure


def bench(settings: Settings, workdir: epath.Path, against: str | None, lengths: list[int], rounds: int) -> dict:
    """Measures train step, eval step and sampling for each update length; writes bench.json and, for more than one
    length, bench.png into `workdir`; prints a table and returns the content of bench.json.

    against: another attn_type, measured in turns with the config's. lengths: update lengths; [] takes the config's.
    """
    lengths = lengths or [settings.train.update_len]
    kinds = [settings.model.attn_type] + ([against] if against and against != settings.model.attn_type else [])
    for length in lengths:
        if length % settings.model.block_len:
            raise UserError(
                f"--lengths={length}: must be a multiple of config.model.block_len={settings.model.block_len}"
            )
    if len(lengths) > 1:
        require("matplotlib", f"--lengths={','.join(map(str, lengths))}: the plot")
    mesh = make_mesh(settings.mesh)
    check_rows(settings, mesh)
    settings = with_tried_attention(settings, mesh)
    unwritten = Unwritten()
    result: dict[str, Any] = dict(
        device=jax.devices()[0].device_kind,
        devices=mesh.size,
        jax=jax.__version__,
        rounds=rounds,
        batch_size=settings.train.batch_size,
        model={name: value for name, value in dataclasses.asdict(settings.model).items() if name != "attn_type"},
        rows=[],
        ratios={},
    )
    for length in lengths:
        rows = measure([with_sizes(settings, kind, length) for kind in kinds], mesh, rounds)
        result["rows"] += rows
        for row in rows:
            say(_line(row))
        if len(rows) == 2 and not any("error" in row for row in rows):
            ours, other = (row["train_step_seconds"]["median"] for row in rows)
            result["ratios"][length] = other / ours
        with unwritten.unless(workdir / "bench.json"):
            workdir.mkdir(parents=True, exist_ok=True)
            write_whole(workdir / "bench.json", json.dumps(result, indent=2) + "\n")  # so that no measurement is lost
        if len(lengths) > 1:
            with unwritten.unless(workdir / "bench.png"):
                draw(result, workdir / "bench.png")
    for length, ratio in result["ratios"].items():
        say(f"T = {length}: {kinds[1]} takes {ratio:.2f} times as long as {kinds[0]}")
    unwritten.tell()
    return result


def with_sizes(settings: Settings, attn_type: str, update_len: int) -> Settings:
    """Returns the settings with another attention and update length."""
    return dataclasses.replace(
        settings,
        model=settings.model.replace(attn_type=attn_type),
        train=dataclasses.replace(settings.train, update_len=update_len),
    )


def draw(result: dict, path: epath.Path) -> None:
    """Plots training tokens per second over the update length, one line per kind of attention."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for kind in dict.fromkeys(row["attn_type"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["attn_type"] == kind and "error" not in row]
        axes.plot(
            [row["update_len"] for row in rows],
            [row["train_tokens_per_second"] for row in rows],
            marker="o",
            label=kind,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("update length T, tokens")
    axes.set_ylabel("training, tokens per second")
    axes.set_title(f"{result['devices']} x {result['device']}, {result['batch_size']} rows")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture = io.BytesIO()  # the folder may be a bucket's
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    path.write_bytes(picture.getvalue())


def _line(row: dict) -> str:
    if "error" in row:
        return f"{row['attn_type']:>5} T {row['update_len']:>7}: does not fit: {row['error']}"
    train = row["train_step_seconds"]
    sampled = ", ".join(f"{n:,.0f} in {rows} row(s)" for rows, n in row["sampled_tokens_per_second"].items())
    return (
        f"{row['attn_type']:>5} T {row['update_len']:>7}: train step {train['median']:.3f} s "
        f"({train['min']:.3f} .. {train['max']:.3f}), {row['train_tokens_per_second']:,.0f} tokens/s, "
        f"{row['train_flops_per_second'] / 1e9:,.1f} GFLOP/s, {row['peak_bytes'] / 2**20:,.0f} MiB; "
        f"eval {row['eval_tokens_per_second']:,.0f} tokens/s, "
        f"sampling {sampled} tokens/s; "
        f"compiled in {row['compile_seconds']:.1f} s"
    )
