"""An object in a bucket that several processes append to, each from a thread of its own.

Objects can't be appended to. So new bytes are uploaded as a separate object, and the bucket joins the two (GCS calls
this compose): an upload is only as large as the new bytes, never as large as the file. The bucket joins them only if
nobody else has written in the meantime. A writer that was late starts over, so that no writer overwrites another's
lines.
"""

import contextlib
import secrets
import threading
import time
from typing import Any

from etils import epath

from tvq_pod.host.terminal import say

UPLOAD_SECONDS = 30.0  # between uploads, unless a caller waits
PIECE_BYTES = 1 << 20  # the largest upload, unless a single write is larger
REQUEST_SECONDS = 20.0  # timeout of a request
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds after a failure
CLOSE_SECONDS = 30.0  # how long `close` waits for the last upload


class BucketFile:
    """Appends to an object in the background. Data that the bucket does not take is kept in memory and tried again.

    A request whose answer is lost is repeated, so a piece may be in the file twice.
    """

    def __init__(self, path: epath.Path, is_text: bool = True):
        """path: gs://BUCKET/NAME. is_text: whether the file consists of lines; if it ends inside a line, a new line is
        started."""
        self._path = path
        _, _, self._bucket_name, self._name = str(path).split("/", 3)
        self._token = secrets.token_hex(4)
        self._bucket = None
        self._may_be_torn = is_text
        self._waiting: list[bytes] = []
        self._changed = threading.Condition()
        self._hurry = self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queues data and returns at once. A write is never split over two uploads."""
        with self._changed:
            self._waiting.append(data)

    def flush(self, seconds: float) -> bool:
        """Waits until everything is in the bucket, for at most `seconds`. Returns whether it is."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def close(self) -> None:
        """Uploads the rest and ends the thread. Warns if the bucket does not take it in time."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if left := sum(map(len, self._waiting)):
            say(f"WARNING: {self._path} can't be written: its last {left:,} bytes are lost")

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                if not failures:
                    self._changed.wait_for(lambda: self._hurry or self._closed, UPLOAD_SECONDS)
                n = self._next_piece()
                piece = b"".join(self._waiting[:n])
                if not n:
                    self._hurry = False
                    if self._closed:
                        return
                    continue
            try:
                is_done = self._append(piece)
            except Exception as error:  # from the network, the bucket, or refreshing credentials
                failures += 1
                if failures == 3:
                    why = " ".join(str(error).split())[:200]
                    say(f"WARNING: {self._path} can't be written ({why}): new data is kept and tried again")
                time.sleep(min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE))
                continue
            failures = 0
            if is_done:
                with self._changed:
                    del self._waiting[:n]
                    self._changed.notify_all()

    def _next_piece(self) -> int:
        """Returns the number of waiting writes that go into the next upload."""
        size = 0
        for n, data in enumerate(self._waiting):
            size += len(data)
            if n and size > PIECE_BYTES:
                return n
        return len(self._waiting)

    def _append(self, piece: bytes) -> bool:
        """Returns whether the piece is in the file now; if not, another writer was faster. Raises what the client
        raises."""
        from google.api_core.exceptions import PreconditionFailed  # this import takes half a second
        from google.cloud import storage

        if self._bucket is None:
            self._bucket = storage.Client(project=None).bucket(self._bucket_name)
        once: dict[str, Any] = dict(timeout=REQUEST_SECONDS, retry=None)  # this class does the retries
        found = self._bucket.get_blob(self._name, **once)
        try:
            if found is None:
                self._bucket.blob(self._name).upload_from_string(piece, if_generation_match=0, **once)
                return True
            last = (found.size or 0) - 1
            torn = self._may_be_torn and last >= 0 and found.download_as_bytes(start=last, end=last, **once) != b"\n"
            piece = b"\n" + piece if torn else piece
            part, whole = self._bucket.blob(f"{self._name}.part-{self._token}"), self._bucket.blob(self._name)
            whole.content_type = found.content_type
            part.upload_from_string(piece, **once)
            whole.compose([found, part], if_generation_match=found.generation, **once)
        except PreconditionFailed:
            return False
        self._may_be_torn = False
        with contextlib.suppress(Exception):  # the next piece has the same name
            part.delete(**once)
        return True
