"""Training streams of a split, in either version of the order of documents."""

from tvq_pod.data.run_streams import begun
from tvq_pod.data.schedule import GROUPED
from tvq_pod.data.store import Split


def made_streams(split: Split, batch_size: int, seed: int = 0, version: int = GROUPED, first_epoch: int = 0):
    """As a run reads them that began with this version."""
    return begun(split, version, seed, batch_size, first_epoch, split.parts)
