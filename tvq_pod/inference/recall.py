"""Recall by distance: how often the value of a key is predicted, by the distance to the key's last occurrence.

It is for the corpora of data/recall.py. A prediction is a hit if the likeliest of all tokens is the target. Distances
are counted in windows of config.model.mem_len tokens, since anything further back is only in the cache.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from tvq_pod.data.recall import distances
from tvq_pod.data.store import Split
from tvq_pod.data.streams import PackedDocuments, read_row
from tvq_pod.inference.tables import write_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOWS = (1, 4, 16, 64, 256)  # the limits between classes of distances
NAMES = ("in_window", *(f"{low}_to_{high}" for low, high in itertools.pairwise(WINDOWS)), "beyond_256")


@dataclasses.dataclass(frozen=True)
class Recall:
    """Results for the values whose keys were seen before, by the class of their distance: see NAMES.

    n_values: int64 [6], the number of values. hits: int64 [6], the number predicted. nats: float64 [6], their summed
    loss. window: config.model.mem_len. chance: the share of hits when guessing a value.
    """

    n_values: np.ndarray
    hits: np.ndarray
    nats: np.ndarray
    window: int
    chance: float

    def numbers(self) -> dict[str, float]:
        """The accuracy overall and in each class that occurs, as in metrics.jsonl."""
        found = {"accuracy": self.hits.sum() / max(1, self.n_values.sum())}
        found |= {f"accuracy_{name}": self.hits[k] / self.n_values[k] for k, name in self._there()}
        return {name: float(value) for name, value in found.items()}

    def _there(self) -> list[tuple[int, str]]:
        return [(k, name) for k, name in enumerate(NAMES) if self.n_values[k]]

    def table(self) -> Iterator[str]:
        """Lines for the terminal."""
        yield f"{'windows since the key':>22}  {'values':>12}  {'loss':>7}  {'accuracy':>9}"
        for k, name in self._there():
            n = int(self.n_values[k])
            yield f"{_words(name):>22}  {n:>12,}  {self.nats[k] / n:>7.4f}  {self.hits[k] / n:>9.2%}"
        yield f"(a window has {self.window} tokens; guessing has an accuracy of {self.chance:.2%})"


class RecallSums:
    """Counts values, hits and losses by class of distance.

    window: config.model.mem_len. n_values: the number of values that the corpus draws from."""

    def __init__(self, window: int, n_values: int):
        self._window, self._n_values = window, n_values
        self.clear()

    def clear(self) -> None:
        """Resets the counts."""
        self._sums = np.zeros([3, len(NAMES)])

    def classes(self, tokens: np.ndarray, doc_ids: np.ndarray) -> np.ndarray:
        """The class of each position, int8 [n], with an extra class for positions that are not counted. tokens,
        doc_ids: integers [n]."""
        found, bounds = distances(tokens, doc_ids), np.array(WINDOWS) * self._window
        return np.where(found, np.searchsorted(bounds, found), len(NAMES)).astype(np.int8)

    def add(self, classes: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> None:
        """Counts positions, given arrays of one shape: their classes, losses in nats, and whether they are hits."""
        for total, weights in zip(self._sums, (np.ones_like(losses), hits, losses), strict=True):
            total += np.bincount(classes.ravel(), weights.ravel(), len(NAMES) + 1)[: len(NAMES)]

    def result(self) -> Recall:
        """The counts since `clear`."""
        n_values, hits, nats = self._sums
        return Recall(n_values.astype(np.int64), hits.astype(np.int64), nats.copy(), self._window, 1 / self._n_values)


class RecallCounter:
    """Counts the recall in a plan's documents, from the losses and hits of all rows, update by update."""

    def __init__(self, documents: Split, plan: PackedDocuments, update_len: int, window: int, n_values: int):
        """window: config.model.mem_len. n_values: the number of values that the corpus draws from. Raises UserError if
        the store is damaged. Reads all tokens of the plan once: every process needs all rows, since it gets all
        losses."""
        self._update_len, self._sums = update_len, RecallSums(window, n_values)
        length = -(-plan.row_len // update_len) * update_len
        rows = (read_row(documents.tokens, plan, row, 0, length) for row in range(plan.n_rows))
        self._classes = np.stack([self._sums.classes(row["targets"], row["doc_ids"]) for row in rows])
        self.clear, self.result = self._sums.clear, self._sums.result

    def add(self, step: int, losses: np.ndarray, hits: np.ndarray) -> None:
        """Counts an update. losses, hits: [n_rows, update_len], for tokens [step * update_len, (step + 1) * update_len)
        of every row."""
        classes = self._classes[:, step * self._update_len : (step + 1) * self._update_len]
        self._sums.add(classes, losses, hits)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("in window", "inside the window")


def write_recall(recall: Recall, folder: epath.Path, name: str) -> None:
    """Writes FOLDER/NAME.tsv, with a line for each class of distances, and, with matplotlib, FOLDER/NAME.png. Raises
    the errors of the disk or the bucket."""
    lines = ["windows\tvalues\tloss\taccuracy"]
    for name_of, n, hits, nats in zip(NAMES, recall.n_values, recall.hits, recall.nats, strict=True):
        lines.append(f"{name_of}\t{n}\t{nats / n:.6f}\t{hits / n:.6f}" if n else f"{name_of}\t0\t\t")
    write_table("accuracy by distance from the key", lines, functools.partial(_draw, recall), folder, name)


def _draw(recall: Recall, axes: "Axes") -> None:
    there = recall.n_values > 0
    names = [_words(name) for name, is_there in zip(NAMES, there, strict=True) if is_there]
    axes.plot(names, recall.hits[there] / recall.n_values[there], marker="o")
    axes.axhline(recall.chance, linestyle=":", color="gray", label="guessing")
    xlabel = f"windows of {recall.window} tokens since the key was seen"
    axes.set(xlabel=xlabel, ylabel="accuracy of the value", ylim=(0, 1.02))
