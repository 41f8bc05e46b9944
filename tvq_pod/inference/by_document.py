"""The loss of each document, as tab-separated values."""

import numpy as np
from etils import epath

from tvq_pod.data.store import Split
from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole
from tvq_pod.host.paths import is_bucket


def check_table(path: epath.Path) -> None:
    """Makes the folder of the table. Raises UserError if the table can't be written there."""
    problem = "is a folder; give a file" if not is_bucket(path) and path.is_dir() else ""
    try:
        if not is_bucket(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"can't be written ({error.strerror or error}); give another file"
    if problem:
        raise UserError(f"--per_document={path}: {problem}")


def write_documents(path: epath.Path, nats: np.ndarray, documents: Split, names: list[str]) -> None:
    """Writes a line for each document that was evaluated, in the order of the store: its number in the split, name,
    tokens (its end-of-document included), bytes, and loss in nats per token.

    nats: float64 [n_documents], sums over the tokens of each; NaN: not evaluated. Raises the errors of the disk or the
    bucket.
    """
    rows = ["document\tname\ttokens\tbytes\tloss"]
    for number in np.flatnonzero(~np.isnan(nats)).tolist():
        n_tokens, n_bytes = int(documents.lengths[number]), int(documents.doc_bytes[number])
        rows.append(f"{number}\t{names[number]}\t{n_tokens}\t{n_bytes}\t{nats[number] / n_tokens:.6f}")
    write_whole(path, "\n".join(rows) + "\n")
