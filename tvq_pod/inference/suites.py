"""Suites of --mode=eval, which measure what a model remembers in long generated documents."""

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
    """The results of a suite."""

    def numbers(self) -> dict[str, float]:
        """The numbers for metrics.jsonl."""
        ...

    def table(self) -> Iterator[str]:
        """Lines for the terminal."""
        ...


def measure(name: str, run: OpenedRun, settings: Settings) -> Found:
    """Measures one of SUITES in config/suites.py, with the sizes of config.eval.suite_*. All processes of a job must
    call it with the same arguments. Raises UserError, before anything is compiled, if the vocabulary can't encode the
    answers."""

    def score(documents: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        return run.model.score(documents, with_hits=True)  # the model is read only now

    if name == "recall":
        return measure_recall(score, run.vocab, settings)
    return measure_retrieval(name, score, run.vocab, settings)


def write_found(found: Found, folder: epath.Path, name: str) -> None:
    """Writes FOLDER/NAME.tsv and, with matplotlib, FOLDER/NAME.png. Raises the errors of the disk or the bucket."""
    if isinstance(found, Recall):
        write_recall(found, folder, name)
    elif isinstance(found, Retrieval):
        write_retrieval(found, folder, name)
