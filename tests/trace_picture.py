"""Draws a trace as a timeline. Not a test: `python -m tests.trace_picture --workdir=DIR --to=FILE.png`.

DIR is a run's folder; its newest trace is drawn. The upper row has the steps, as the host gave them to the devices; the
lower one the operations of the thread that was busiest, in the color of their pass; texts name the longest of them.
"""

import argparse
import collections
import csv
import json
import pathlib

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

COLORS = dict(forward="tab:blue", backward="tab:orange", recompute="tab:purple", update="tab:green", other="tab:gray")
NAMED = 8  # operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--to", required=True)
    given = parser.parse_args()
    from xprof.convert.raw_to_tool_data import xspace_to_tool_data

    folder = pathlib.Path(given.workdir) / "profile"
    path = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)  # the newest
    data, _ = xspace_to_tool_data([str(path)], "trace_viewer", {})
    events = [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]
    with (folder / "operations.tsv").open() as file:
        rows = {row["operation"]: row for row in csv.DictReader(file, delimiter="\t")}
    steps = sorted((e for e in events if e["name"].startswith("train")), key=lambda event: event["ts"])
    operations = [e for e in events if e.get("args", {}).get("hlo_module", "").startswith("jit_train_step")]
    busy, spent = collections.Counter(), collections.Counter()
    for event in operations:
        busy[event["tid"]] += event["dur"]
    thread = busy.most_common(1)[0][0]
    shown = [event for event in operations if event["tid"] == thread and event["args"]["hlo_op"] in rows]
    for event in shown:
        spent[event["args"]["hlo_op"]] += event["dur"]
    figure, (axes, table) = pyplot.subplots(2, figsize=(11, 5), height_ratios=[2, 1.5])
    for event in steps:
        axes.broken_barh([(event["ts"] / 1e3, event["dur"] / 1e3)], (1.1, 0.8), color="lightgray", edgecolor="black")
        if event["dur"] > 1e5:  # the first waits for nothing: the host runs ahead by one step
            axes.text(event["ts"] / 1e3 + 10, 1.5, event["name"], va="center")
    for kind, color in COLORS.items():
        own = [e for e in shown if rows[e["args"]["hlo_op"]]["path"].split()[0] == kind]
        if own:
            axes.broken_barh([(e["ts"] / 1e3, e["dur"] / 1e3) for e in own], (0, 0.8), color=color, label=kind)
    axes.set_yticks([0.4, 1.5], ["operations", "host"])
    axes.set_xlabel("milliseconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=5, frameon=False)
    lines = []
    for name, duration in spent.most_common(NAMED):
        passage, _, names = rows[name]["path"].partition(" ")
        what = f"{passage} .../{'/'.join(names.split('/')[-3:])}"
        line, _, _ = rows[name]["line"].partition(" in ")
        lines.append(f"{duration / 1e3 / len(steps):7.1f} ms a step  {name:<24}  {what:<60.60}  {line}")
    table.axis("off")
    table.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8)
    figure.tight_layout()
    figure.savefig(given.to, dpi=110)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
