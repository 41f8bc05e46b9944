"""Training streams of a split, in either version of the order of documents."""

from tvq_pod.data.run_streams import order_of
from tvq_pod.data.schedule import GROUPED
from tvq_pod.data.store import Split
from tvq_pod.data.streams import TrainStreams


def made_streams(split: Split, batch_size: int, seed: int = 0, version: int = GROUPED, first_epoch: int = 0):
    """As a run reads them that began with this version."""
    return TrainStreams(order_of(split, version, seed, split.parts), batch_size, first_epoch)
