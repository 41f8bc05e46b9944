"""Curves of a run, drawn from the lines of metrics.jsonl."""

import io
from collections.abc import Sequence

import numpy as np

MOST_POINTS = 1000  # of a curve; more are averaged
CURVES = {  # values that get a curve, if the run has them, and the label of its axis
    "loss": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "word_perplexity": "perplexity of words",
    "accuracy": "accuracy of recall",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "code_perplexity": "perplexity of codes",
    "dead_codes": "share of dead codes",
    "tokens_per_second": "tokens per second",
    "mfu": "MFU",
    "bad_steps": "bad steps",
}
LOGARITHMIC = ("grad_norm",)


def series(lines: Sequence[dict], splits: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Points [2, n], for each name of CURVES that occurs and each split that has it: steps and values, in the order of
    steps. Of two lines with the same step and split the later one counts; values that are not numbers are left out."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        if line["split"] in splits:
            for name in CURVES:
                if isinstance(value := line.get(name), int | float):
                    found.setdefault(name, {}).setdefault(line["split"], {})[line["step"]] = value
                elif name in line:  # not finite in the line that counts
                    found.get(name, {}).get(line["split"], {}).pop(line["step"], None)
    return {
        name: {split: np.array(sorted(points.items()), float).T for split, points in found[name].items() if points}
        for name in CURVES
        if any(found.get(name, {}).values())
    }


def thinned(points: np.ndarray) -> np.ndarray:
    """The points, reduced to at most MOST_POINTS [2, n] by averaging neighbors."""
    if points.shape[1] <= MOST_POINTS:
        return points
    groups = np.array_split(points, MOST_POINTS, axis=1)
    return np.stack([group.mean(axis=1) for group in groups], axis=1)


def draw(name: str, by_split: dict[str, np.ndarray]) -> bytes:
    """Draws the curves of one name of CURVES, by split, as an SVG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for split, points in by_split.items():
        steps, values = thinned(points)
        is_curve = split == "train"
        axes.plot(
            steps, values, label=split, linewidth=1, marker="" if is_curve and len(steps) > 1 else "o", markersize=3
        )
    if name in LOGARITHMIC and all((points[1] > 0).all() for points in by_split.values()):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=CURVES[name])
    axes.grid(alpha=0.3)
    if len(by_split) > 1:
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
