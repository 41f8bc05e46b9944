"""Writes an evaluation's table to files: its lines, and a plot of them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from etils import epath

from tvq_pod.host.extras import install, is_installed
from tvq_pod.host.terminal import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_table(what: str, lines: Sequence[str], draw: Callable[["Axes"], None], folder: epath.Path, name: str) -> None:
    """Writes FOLDER/NAME.tsv and, with matplotlib, FOLDER/NAME.png; prints their paths. what: the table's description.
    draw: draws the plot, and labels the lines for the legend. Raises the errors of the disk or the bucket."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    if not is_installed("matplotlib"):
        say(f"{what}: {folder / name}.tsv; a plot needs {install('data')}")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set(title=name)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with (folder / f"{name}.png").open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    say(f"{what}: {folder / name}.tsv, .png")
