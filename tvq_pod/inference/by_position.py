"""Loss by position in the document, which shows the value of a long context: a table, tab-separated values and a
plot."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from tvq_pod.inference.tables import write_table
from tvq_pod.run.metrics import LOG_2

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUCKET = 1024  # tokens of context in one group


@dataclasses.dataclass(frozen=True)
class Positions:
    """nats: float64 [n], the summed loss of tokens at positions [k * BUCKET, (k + 1) * BUCKET) of their documents.
    n_tokens: int64 [n], the number of these tokens. bytes_per_token: the mean over all of them."""

    nats: np.ndarray
    n_tokens: np.ndarray
    bytes_per_token: float

    def bits_per_byte(self, begin: int = 0, end: int | None = None) -> float:
        """Bits per byte of buckets begin .. end - 1, as if every token had the mean number of bytes."""
        return float(
            self.nats[begin:end].sum() / self.n_tokens[begin:end].sum() / LOG_2 / self.bytes_per_token
        )  # fmt: skip

    def table(self) -> Iterator[str]:
        """Lines for the terminal; a line further back in the document covers more buckets."""
        yield f"{'tokens before':>22}  {'tokens':>12}  {'loss':>7}  {'bits/byte':>9}"
        begin, end = 0, 1
        while begin < len(self.nats):
            end = min(end, len(self.nats))
            n, nats = int(self.n_tokens[begin:end].sum()), float(self.nats[begin:end].sum())
            places = f"{begin * BUCKET:,} - {end * BUCKET - 1:,}"
            yield f"{places:>22}  {n:>12,}  {nats / n:>7.4f}  {self.bits_per_byte(begin, end):>9.4f}"
            begin, end = end, 2 * end


def write_positions(positions: Positions, folder: epath.Path, name: str) -> None:
    """Writes FOLDER/NAME.tsv, with a line for each bucket, and, with matplotlib, FOLDER/NAME.png. Raises the errors of
    the disk or the bucket."""
    rows = [
        f"{index * BUCKET}\t{n}\t{nats / n:.6f}\t{positions.bits_per_byte(index, index + 1):.6f}"
        for index, (nats, n) in enumerate(zip(positions.nats, positions.n_tokens, strict=True))
    ]
    lines = ["first_position\ttokens\tloss\tbits_per_byte", *rows]
    write_table("loss by position in the document", lines, functools.partial(_draw, positions), folder, name)


def _draw(positions: Positions, axes: "Axes") -> None:
    places = (np.arange(len(positions.nats)) + 0.5) * BUCKET
    axes.step(places, [positions.bits_per_byte(k, k + 1) for k in range(len(places))], where="mid")
    axes.axhline(positions.bits_per_byte(), linestyle=":", color="gray", label="all")
    axes.set(xlabel="tokens before, in the document", ylabel="bits per byte")
