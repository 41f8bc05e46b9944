"""Studies of what makes a model better. Not a test: each trains many models, by the commands that a user has.

    python -m tests.study --name=recall --workdir=DIR

A study has arms, each a few settings that differ, and seeds. All runs are trained, one after the other, and evaluated
on the validation split. A run that is complete in DIR is not trained again, so a study that was stopped goes on. Writes
docs/studies/NAME.tsv, a line for each run, and a picture if the study has one; prints a table of means over seeds with
their standard errors.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

STUDIED = pathlib.Path(__file__).resolve().parent.parent / "docs" / "studies"
DISTANCES = {  # in windows, and the metrics that have them
    "inside": "accuracy_in_window",
    "1 to 4": "accuracy_1_to_4",
    "4 to 16": "accuracy_4_to_16",
    "16 to 64": "accuracy_16_to_64",
    "64 to 256": "accuracy_64_to_256",
}

DEPTHS = {  # tokens before, in the document, and the metrics that `losses_by_depth` makes
    "0 to 1k": "loss_at_0",
    "1k to 2k": "loss_at_1024",
    "2k to 4k": "loss_at_2048",
    "4k to 8k": "loss_at_4096",
    "8k on": "loss_at_8192",
}

PAIRS = (8, 16, 32, 64, 128, 256, 512)  # in a document, that the models of the study of capacity are asked for


@dataclasses.dataclass(frozen=True)
class Run:
    """One training. numbers: what the evaluation of the validation split gave; minutes: wall time of all; curve: tokens
    trained with, seconds that training took until then, and the loss of the steps that were logged together."""

    arm: str
    seed: int
    numbers: dict[str, float]
    minutes: float
    curve: list[tuple[int, float, float]]


@dataclasses.dataclass(frozen=True)
class Study:
    """config: of configs/. arms: by name, what differs, as settings below `config.`. settings: of all arms. columns:
    metrics of the table, by their headings. once: arms that are trained with the first seed alone. by_depth: every run
    is also evaluated by place in the document, which gives the metrics of DEPTHS. by_pairs: every run is also asked for
    values in documents of so many pairs, each, which gives metrics accuracy_of_N: how often a value is predicted whose
    key was last seen beyond the window."""

    config: str
    arms: dict[str, dict]
    columns: dict[str, str]
    seeds: tuple[int, ...] = (0, 1, 2)
    once: tuple[str, ...] = ()
    settings: dict = dataclasses.field(default_factory=dict)
    by_depth: bool = False
    by_pairs: tuple[int, ...] = ()
    plot: Callable[["Study", list[Run], pathlib.Path], None] = lambda study, runs, path: None


def by_distance(study: Study, runs: list[Run], path: pathlib.Path) -> None:
    """A line for each arm: accuracy by distance, with the range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm, metrics in _by_arm(runs).items():
        means = [statistics.mean(metrics[name]) for name in study.columns.values()]
        line = axes.plot(list(study.columns), means, marker="o", label=arm)[0]
        low, high = ([pick(metrics[name]) for name in study.columns.values()] for pick in (min, max))
        axes.fill_between(list(study.columns), low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel="windows since the key was last seen", ylabel="accuracy of its value", ylim=(0, 1.02))
    axes.axhline(1 / 32, linestyle=":", color="gray", label="guessing a value")
    axes.legend()
    figure.savefig(path, dpi=120)


def advantage_by_depth(study: Study, runs: list[Run], path: pathlib.Path) -> None:
    """How many nats a token each arm without the cache loses against the same with it, which comes before it: by depth,
    with standard errors over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    arms = list(study.arms)
    by_arm = {arm: {run.seed: run.numbers for run in runs if run.arm == arm} for arm in study.arms}
    for first, other in zip(arms[::2], arms[1::2], strict=True):
        seeds = sorted(by_arm[first].keys() & by_arm[other].keys())
        gains = [[by_arm[other][seed][m] - by_arm[first][seed][m] for seed in seeds] for m in DEPTHS.values()]
        errors = [statistics.stdev(gain) / len(gain) ** 0.5 if len(gain) > 1 else 0.0 for gain in gains]
        means = [statistics.mean(gain) for gain in gains]
        axes.errorbar(list(DEPTHS), means, yerr=errors, marker="o", capsize=3, label=first)
    axes.axhline(0, linestyle=":", color="gray")
    axes.set(xlabel="tokens before, in the document", ylabel="nats per token that the cache gains")
    axes.legend()
    figure.savefig(path, dpi=120)


def accuracy_by_pairs(study: Study, runs: list[Run], path: pathlib.Path) -> None:
    """A line for each arm: accuracy beyond the window over the number of pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm, metrics in _by_arm(runs).items():
        axes.plot(
            study.by_pairs, [statistics.mean(metrics[f"accuracy_of_{n}"]) for n in study.by_pairs], "o-", label=arm
        )
    axes.axhline(1 / 32, linestyle=":", color="gray", label="guessing a value")
    axes.set_xscale("log", base=2)
    axes.set_xticks(study.by_pairs, list(map(str, study.by_pairs)))
    axes.set(xlabel="pairs in the document", ylabel="accuracy beyond the window", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, dpi=120)


def loss_over_tokens_and_time(study: Study, runs: list[Run], path: pathlib.Path) -> None:
    """A line for each run, twice: over tokens and over the time of its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for run in runs:
        tokens, seconds, losses = zip(*run.curve, strict=True)
        by_tokens.plot([n / 1e6 for n in tokens], losses, label=run.arm)
        by_time.plot([s / 60 for s in seconds], losses, label=run.arm)
    by_tokens.set(xlabel="millions of tokens", ylabel="training loss, nats per token", ylim=(None, 7.0))
    by_time.set(xlabel="minutes")
    by_time.legend()
    figure.savefig(path, dpi=120)


STUDIES = {
    "recall": Study(
        config="recall",
        arms={
            "with the cache": {},
            "without the cache": {"model.agg_cache": False, "train.num_steps": 1500},
            "quadratic attention": {
                "model.attn_type": "full",
                "train.update_len": 1024,
                "train.batch_size": 2,
                "train.num_steps": 1500,
                "eval.update_len": 4112,
            },
        },
        columns=DISTANCES,
        once=("without the cache", "quadratic attention"),
        plot=by_distance,
    ),
    "recall_recipe": Study(
        config="recall",
        arms={
            "all": {},
            "recall_smaller=0": {"data.recall_smaller": 0, "data.recall_documents": 2000},
            "c_revive=0": {"model.c_revive": 0.0},
            "c_gamma=0.99": {"model.c_gamma": 0.99},
            "temperature=fixed": {"model.temperature": "fixed"},
            "key_shift=False": {"model.key_shift": False},
            "window_bias=8": {"model.window_bias": 8.0},
            "c_beta=0.0001": {"model.c_beta": 1e-4},
            "n_code=256": {"model.n_code": 256},
        },
        columns=DISTANCES,
        settings={"train.num_steps": 400},
    ),
    "capacity": Study(
        config="recall",
        arms={
            "64 codes": {"model.n_code": 64},
            "256 codes": {"model.n_code": 256},
            "512 codes": {"model.n_code": 512},
            "4 heads of 64 codes": {"model.n_code": 64, "model.n_head": 4, "model.d_v": 32},
        },
        columns={f"{n} pairs": f"accuracy_of_{n}" for n in PAIRS},
        seeds=(0,),
        settings={
            "train.num_steps": 1500,
            "data.recall_key_bytes": 2,
            "data.recall_keys": 1024,
            "data.recall_pairs": 512,
            "data.recall_bytes": 8192,
            "data.recall_smaller": 10,
            "data.recall_documents": 60_000,
            "data.recall_held_out": 16,
            "eval.every_steps": 0,
        },
        by_pairs=PAIRS,
        plot=accuracy_by_pairs,
    ),
    "memory": Study(
        config="ansible",
        arms={
            "with the cache": {},
            "without the cache": {"model.agg_cache": False},
        },
        columns={"bits per byte": "bits_per_byte", "nats per token": "loss"} | DEPTHS,
        by_depth=True,
        plot=advantage_by_depth,
    ),
    "memory_recipe": Study(
        config="ansible",
        arms={
            "all": {},
            "key_shift=False": {"model.key_shift": False},
            "context_schedule=": {"train.context_schedule": ""},
        },
        columns={"bits per byte": "bits_per_byte", "nats per token": "loss"},
        once=("all",),  # "with the cache" of the study `memory` has three seeds of it
    ),
    "compute": Study(  # steps that take each arm about as long
        config="ansible",
        arms={
            "with the cache": {"train.num_steps": 300},
            "without the cache": {"model.agg_cache": False, "train.num_steps": 420},
            "quadratic attention": {"model.attn_type": "full", "train.num_steps": 60},
        },
        columns={"bits per byte": "bits_per_byte", "nats per token": "loss"},
        seeds=(0,),
        settings={
            "train.update_len": 8192,
            "train.batch_size": 1,
            "model.reduction": "serial",  # of 256 blocks; the program of the other one takes minutes to compile
            "train.context_schedule": "",
            "train.log_every_steps": 10,
            "optimizer.schedule": "constant",
            "eval.max_tokens": 65_536,
        },
        plot=loss_over_tokens_and_time,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=STUDIES, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", default="", help="numbers with commas; those of the study if not given")
    asked = parser.parse_args()
    study = STUDIES[asked.name]
    seeds = [int(seed) for seed in asked.seeds.split(",")] if asked.seeds else study.seeds
    runs = []
    for seed in seeds:  # each seed for all arms, so that a study that is stopped can be read
        for arm in (arm for arm in study.arms if seed == seeds[0] or arm not in study.once):
            runs.append(trained(study, arm, seed, asked.workdir / asked.name))
            write(study, runs, STUDIED / f"{asked.name}.tsv")
    study.plot(study, runs, STUDIED / f"{asked.name}.png")
    print("\n".join(table(study, runs)))


def trained(study: Study, arm: str, seed: int, folder: pathlib.Path) -> Run:
    """Trains, or reads what was trained before."""
    workdir = folder / re.sub(r"[^\w.=]+", "_", arm) / f"seed_{seed}"
    done = workdir / "study.json"
    settings = {"data.store": str(folder / _store_name(study, arm)), "seed": seed} | study.settings | study.arms[arm]
    if not done.exists():
        print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        began = time.monotonic()
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "study.log").open("ab") as log:
            command = [sys.executable, "-m", "tvq_pod.main", f"--config=configs/{study.config}.py"]
            subprocess.run([*command, f"--workdir={workdir}", *flags], check=True, stdout=log, stderr=log)
        done.write_text(json.dumps(dict(minutes=(time.monotonic() - began) / 60)))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    numbers = [line for line in lines if line["split"] == "validation"][-1]
    if study.by_depth:
        numbers |= losses_by_depth(workdir)
    for n_pairs in study.by_pairs:
        numbers[f"accuracy_of_{n_pairs}"] = accuracy_of(workdir, n_pairs)
    return Run(arm, seed, numbers, json.loads(done.read_text())["minutes"], curve(workdir, lines))


def curve(workdir: pathlib.Path, lines: list[dict]) -> list[tuple[int, float, float]]:
    """See Run, from the lines of metrics.jsonl."""
    train = json.loads((workdir / "config.json").read_text())["train"]
    found, step, seconds = [], 0, 0.0
    for line in (line for line in lines if line["split"] == "train"):
        n_tokens = (line["step"] - step) * train["batch_size"] * train["update_len"]
        step, seconds = line["step"], seconds + n_tokens / line["tokens_per_second"]
        found.append((step * train["batch_size"] * train["update_len"], seconds, line["loss"]))
    return found


def losses_by_depth(workdir: pathlib.Path) -> dict[str, float]:
    """Nats per token between the places of DEPTHS, from the file of --mode=eval; evaluates if there is none."""
    if not (found := sorted(workdir.glob("eval/step_*_validation.tsv"))):
        command = [sys.executable, "-m", "tvq_pod.main", "--mode=eval", "--split=validation", f"--workdir={workdir}"]
        with (workdir / "study.log").open("ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        found = sorted(workdir.glob("eval/step_*_validation.tsv"))
    rows = [[float(cell) for cell in line.split("\t")] for line in found[-1].read_text().splitlines()[1:]]
    bounds = [int(name.removeprefix("loss_at_")) for name in DEPTHS.values()]
    losses = {}
    for name, begin, end in zip(DEPTHS.values(), bounds, [*bounds[1:], float("inf")], strict=True):
        part = [(n, loss) for place, n, loss, _ in rows if begin <= place < end]
        if n_tokens := sum(n for n, _ in part):
            losses[name] = sum(n * loss for n, loss in part) / n_tokens
    return losses


def accuracy_of(workdir: pathlib.Path, n_pairs: int) -> float:
    """How often a value is predicted whose key was last seen beyond the window, in 16 documents of so many pairs and
    eight times as many questions; asks the last checkpoint if it was not asked yet."""
    kept = workdir / f"study_{n_pairs}_pairs.tsv"
    if not kept.exists():
        data = json.loads((workdir / "config.json").read_text())["data"]
        settings = {"data.recall_pairs": n_pairs, "eval.suite_trials": 16}
        settings["eval.suite_longest"] = max(512, 9 * n_pairs * (data["recall_key_bytes"] + 1))
        command = [sys.executable, "-m", "tvq_pod.main", "--mode=eval", "--suite=recall", f"--workdir={workdir}"]
        with (workdir / "study.log").open("ab") as log:
            flags = [f"--config.{name}={value}" for name, value in settings.items()]
            subprocess.run([*command, *flags], check=True, stdout=log, stderr=log)
        max(workdir.glob("eval/step_*_recall.tsv"), key=lambda path: path.stat().st_mtime).rename(kept)
    rows = [line.split("\t") for line in kept.read_text().splitlines()[1:]]
    beyond = [(int(n), float(accuracy)) for name, n, _, accuracy in rows if name != "in_window" and int(n)]
    return sum(n * accuracy for n, accuracy in beyond) / sum(n for n, _ in beyond)


def _store_name(study: Study, arm: str) -> str:
    """Runs of the same corpus share a store."""
    settings = study.settings | study.arms[arm]
    own = [f"{name}={value}" for name, value in sorted(settings.items()) if name.startswith("data.")]
    return re.sub(r"[^\w.=]+", "_", "_".join(["store", *own]))


def write(study: Study, runs: list[Run], path: pathlib.Path) -> None:
    """A line for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(["arm", "seed", *study.columns.values(), "minutes"])]
    for run in runs:
        numbers = (f"{run.numbers[name]:.5f}" if name in run.numbers else "" for name in study.columns.values())
        lines.append("\t".join([run.arm, str(run.seed), *numbers, f"{run.minutes:.1f}"]))
    path.write_text("\n".join(lines) + "\n")


def table(study: Study, runs: list[Run]) -> list[str]:
    """A Markdown table: for each arm the mean over seeds, and its standard error if there are several."""
    lines = [f"| | {' | '.join(study.columns)} | minutes |", "| --- " * (len(study.columns) + 2) + "|"]
    for arm, metrics in _by_arm(runs).items():
        cells = [_mean(metrics[name]) for name in study.columns.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} | {statistics.mean(metrics['minutes']):.0f} |")
    return lines


def _by_arm(runs: list[Run]) -> dict[str, dict[str, list[float]]]:
    """For each arm and metric, the values of its seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        metrics = found.setdefault(run.arm, {})
        for name, value in (run.numbers | dict(minutes=run.minutes)).items():
            metrics.setdefault(name, []).append(value)
    return found


def _mean(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
