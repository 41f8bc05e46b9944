"""Retrieval by length and depth: how often a model gives the answer that a long document hides, as a table,
tab-separated values and a heat map.

A document counts as answered if each token of the answer is the likeliest, given the document and the answer's earlier
tokens. This is equivalent to greedy generation giving the answer: it takes the likeliest token at each step, so by
induction it has drawn the same earlier tokens, and reads what the evaluation reads.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.data.vocab import Vocab
from tvq_pod.inference.haystacks import Score, asked, haystack
from tvq_pod.inference.tables import write_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHORTEST = 512  # tokens


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Results by depth and length [n_depths, n_lengths]: answered, the share of documents that were answered; accuracy,
    that of the answer's tokens; nats, the loss of a complete answer. trials: documents in each cell. chance: the value
    of answered when guessing, chance_of_token: the same for accuracy, n_answers: the number of answers that are equally
    likely then, n_named: the number of answers that a document names."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    answered: np.ndarray
    accuracy: np.ndarray
    nats: np.ndarray
    trials: int
    n_answers: int
    n_named: int
    chance_of_token: float

    @property
    def chance(self) -> float:
        return 1 / self.n_answers

    def numbers(self) -> dict[str, float]:
        """Means over all documents, and over those of each length, as in metrics.jsonl."""
        found = dict(answered=self.answered.mean(), accuracy=self.accuracy.mean(), answer_loss=self.nats.mean())
        found |= {f"answered_{n}": self.answered[:, k].mean() for k, n in enumerate(self.lengths)}
        found |= dict(chance=self.chance, chance_of_token=self.chance_of_token)
        return {name: float(value) for name, value in found.items()}

    def table(self) -> Iterator[str]:
        """Lines for the terminal: shares of documents answered, and means for each length."""
        yield f"{'answered at depth':>22}" + "".join(f"{n:>9,}" for n in self.lengths) + "  tokens"
        for depth, row in zip(self.depths, self.answered, strict=True):
            yield f"{depth:>22.0%}" + "".join(f"{share:>9.0%}" for share in row)
        means = (("accuracy of its tokens", self.accuracy, ".1%"), ("loss of an answer", self.nats, ".2f"))
        for name, values, form in means:
            yield f"{name:>22}" + "".join(f"{value:>9{form}}" for value in values.mean(axis=0))
        named = f"; one of those in the text {1 / self.n_named:.0%}" if self.n_named > 1 else ""
        yield (
            f"(guessing: answered {self.chance:.4%}{named}; tokens {self.chance_of_token:.1%}; loss "
            f"{math.log(self.n_answers):.2f}; {self.trials} documents of each depth and length)"
        )


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """The lengths longest, half of it, and so on down to SHORTEST; the shortest first."""
    n = (longest // SHORTEST).bit_length()
    return tuple(longest >> halvings for halvings in reversed(range(n)))


def measure_retrieval(kind: str, score: Score, vocab: Vocab, settings: Settings) -> Retrieval:
    """Evaluates one of RETRIEVAL in config/suites.py, on the grid of config.eval.suite_*. All processes of a job must
    call it with the same arguments. Raises UserError if the vocabulary can't encode the answers."""
    how = settings.eval
    lengths = lengths_up_to(how.suite_longest)
    depths = tuple(k / (how.suite_depths - 1) for k in range(how.suite_depths))
    cells = [(depth, length, n) for depth in depths for length in lengths for n in range(how.suite_trials)]
    texts = [haystack(kind, how.suite_seed, length, depth, n, settings.data) for depth, length, n in cells]
    documents = [asked(text, length, vocab) for text, (_, length, _) in zip(texts, cells, strict=True)]
    found = [
        (nats[-document.n_answer :].sum(dtype=np.float64), hits[-document.n_answer :])
        for document, (nats, hits) in zip(documents, score([document.tokens for document in documents]), strict=True)
    ]

    def by_cell(values: Sequence[float]) -> np.ndarray:
        return np.reshape(values, [len(depths), len(lengths), how.suite_trials]).mean(axis=-1)

    n_answers = texts[0].n_answers
    return Retrieval(
        lengths=lengths,
        depths=depths,
        answered=by_cell([float(hits.all()) for _, hits in found]),
        accuracy=by_cell([float(hits.mean()) for _, hits in found]),
        nats=by_cell([nats for nats, _ in found]),
        trials=how.suite_trials,
        n_answers=n_answers,
        n_named=texts[0].n_named,
        chance_of_token=float(np.mean([n_answers ** (-1 / document.n_answer) for document in documents])),
    )


def write_retrieval(found: Retrieval, folder: epath.Path, name: str) -> None:
    """Writes FOLDER/NAME.tsv, with a line for each length and depth, and, with matplotlib, FOLDER/NAME.png, a heat map.
    Raises the errors of the disk or the bucket."""
    lines = ["length\tdepth\tdocuments\tanswered\taccuracy\tloss\tchance\tchance_of_token"]
    for column, length in enumerate(found.lengths):
        for row, depth in enumerate(found.depths):
            values = (found.answered, found.accuracy, found.nats)
            shares = "\t".join(f"{value[row, column]:.6f}" for value in values)
            chances = f"{found.chance:.3e}\t{found.chance_of_token:.6f}"
            lines.append(f"{length}\t{depth:.4f}\t{found.trials}\t{shares}\t{chances}")
    write_table("retrieval by length and depth", lines, functools.partial(_draw, found), folder, name)


def _draw(found: Retrieval, axes: "Axes") -> None:
    image = axes.imshow(found.answered, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(found.lengths)), [f"{n:,}" for n in found.lengths], rotation=30)
    axes.set_yticks(range(len(found.depths)), [f"{depth:.0%}" for depth in found.depths])
    if found.answered.size <= 200:
        for (row, column), share in np.ndenumerate(found.answered):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black")
    axes.set(xlabel="tokens of the document", ylabel="depth of the answer")
    label = f"share answered (guessing: {found.chance:.2g})"
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=label)
