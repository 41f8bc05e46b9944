"""Draws docs/recall.png from docs/figures.json. Not a test: `python -m tests.recall_picture --to=docs/recall.png`."""

import argparse

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from tests import figures

DISTANCES = {
    "inside": "inside the window",
    "near": "1 to 4 windows",
    "far": "4 to 16",
    "farther": "16 to 64",
    "farthest": "64 to 256",
}
RUNS = {
    "train recall": "with the compressed cache",
    "train recall with quadratic attention": "quadratic attention",
    "train recall without the cache": "without the cache",
}
GUESSING = 100 / 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", required=True)
    given = parser.parse_args()
    entries = figures.load()
    _, axes = pyplot.subplots(figsize=(6.4, 2.8))
    for (name, label), width in zip(RUNS.items(), (6, 2, 2), strict=True):  # the first two lie on each other
        values = [entries[name]["values"][distance] for distance in DISTANCES]
        axes.plot([*DISTANCES.values()], values, marker="o", label=label, linewidth=width, markersize=width + 4)
    axes.axhline(GUESSING, color="gray", linestyle=":", label="guessing")
    axes.set(xlabel="distance to where the key was last seen", ylabel="recalled (%)", ylim=(0, 105))
    axes.legend(loc="center right")
    axes.spines[["top", "right"]].set_visible(False)
    pyplot.tight_layout()
    pyplot.savefig(given.to, dpi=130)


if __name__ == "__main__":
    main()
