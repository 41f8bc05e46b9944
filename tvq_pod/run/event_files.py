"""TensorBoard event files, written by tensorboardX."""

import contextlib
import os

from etils import epath

from tvq_pod.host.bucket_file import BucketFile

CHECKED_WITH = {"tensorboardx": "2.6.5"}  # undocumented parts of it are used


class Events:
    """Appends numbers of a run. tensorboardX writes them in a thread, which ends for good at its first error, such as a
    full disk; then another file is begun."""

    def __init__(self, folder: str):
        self._folder = folder
        self._writer = None

    def add(self, points: dict[str, float], step: int) -> None:
        """Writes the numbers of one step, by name."""
        # This takes a while: tensorboardX imports the cloud packages that it finds.
        from tensorboardX import SummaryWriter, record_writer

        try:
            if self._writer is None or not _is_writing(self._writer):
                record_writer.register_writer_factory("gs", EventsInBucket())
                own = f".{os.getpid()}"  # two processes that start in the same second need different files
                self._writer = SummaryWriter(self._folder, max_queue=1000, flush_secs=30, filename_suffix=own)
            for name, value in points.items():
                self._writer.add_scalar(name, value, step)
        except OSError:  # the next step may succeed; metrics.jsonl has the numbers
            self._writer = None

    def flush(self) -> None:
        """Starts writing what was added, without waiting for it."""
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
    """A file with the interface of tensorboardX's record writers."""

    def flush(self, seconds: float = 0.0) -> bool:
        return super().flush(seconds)
