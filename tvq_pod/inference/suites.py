"""Suites of --mode=eval: what a model remembers over long documents that are made for the question."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.inference.opened import OpenedRun
from tvq_pod.inference.recall import Recall, write_recall
from tvq_pod.inference.recall_suite import measure_recall
from tvq_pod.inference.retrieval import Retrieval, measure_retrieval, write_retrieval


class Found(Protocol):
    """What a suite found."""

    def numbers(self) -> dict[str, float]:
        """The numbers as metrics.jsonl has them."""
        ...

    def table(self) -> Iterator[str]:
        """Lines for people."""
        ...


def measure(name: str, run: OpenedRun, settings: Settings) -> Found:
    """Measures one of SUITES in config/suites.py, as large as config.eval.suite_* say. All processes of a job must call
    it alike. Raises UserError if the vocabulary can't encode what is asked for, before anything is compiled."""

    def score(documents: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        return run.model.score(documents, with_hits=True)  # the model is read only now

    if name == "recall":
        return measure_recall(score, run.vocab, settings)
    return measure_retrieval(name, score, run.vocab, settings)


def write_found(found: Found, folder: epath.Path, name: str) -> None:
    """Writes FOLDER/NAME.tsv and, with matplotlib, FOLDER/NAME.png. Raises what the disk or the bucket does."""
    if isinstance(found, Recall):
        write_recall(found, folder, name)
    elif isinstance(found, Retrieval):
        write_retrieval(found, folder, name)
