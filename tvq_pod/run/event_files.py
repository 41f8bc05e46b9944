"""TensorBoard's event files, by tensorboardX."""

import contextlib
import os

from etils import epath

from tvq_pod.host.bucket_file import BucketFile

CHECKED_WITH = {"tensorboardx": "2.6.5"}  # of which parts are used that it does not document


class Events:
    """Numbers of a run, appended. tensorboardX writes them in a thread, which ends for good at its first error, such as
    a full disk; then another file is begun."""

    def __init__(self, folder: str):
        self._folder = folder
        self._writer = None

    def add(self, points: dict[str, float], step: int) -> None:
        """Writes the numbers of one step, by name."""
        # This takes a while: tensorboardX imports what it finds of clouds.
        from tensorboardX import SummaryWriter, record_writer

        try:
            if self._writer is None or not _is_writing(self._writer):
                record_writer.register_writer_factory("gs", EventsInBucket())
                own = f".{os.getpid()}"  # of two processes that start in the same second, each has a file
                self._writer = SummaryWriter(self._folder, max_queue=1000, flush_secs=30, filename_suffix=own)
            for name, value in points.items():
                self._writer.add_scalar(name, value, step)
        except OSError:  # the next step may have more luck; metrics.jsonl has the numbers
            self._writer = None

    def flush(self) -> None:
        """Begins to write what was added, and does not wait for it."""
        if self._writer is not None and self._writer.file_writer is not None:
            self._writer.file_writer.flush()

    def close(self) -> None:
        """Flushes."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def _is_writing(writer) -> bool:
    """Whether a SummaryWriter's thread is alive."""
    return writer.file_writer.event_writer._worker.is_alive()


class EventsInBucket:
    """Opens event files in a bucket for tensorboardX, whose own writer uploads the complete file each time."""

    def directory_check(self, path: str) -> None:
        """Buckets have no folders."""

    def open(self, path: str) -> "EventFile":
        return EventFile(epath.Path(path), is_text=False)


class EventFile(BucketFile):
    """What tensorboardX calls a record writer."""

    def flush(self, seconds: float = 0.0) -> bool:
        return super().flush(seconds)
