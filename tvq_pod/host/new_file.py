"""A text file that gets its name only when it is complete."""

import fcntl
import os
from typing import TextIO


class NewFile:
    """Writes lines to PATH.partial, which becomes PATH at the end. A killed process leaves PATH.partial, which the next
    one replaces."""

    def __init__(self, path: str):
        """Raises BlockingIOError if another process is writing the file, and OSError if the disk fails."""
        self._path, self._partial = path, f"{path}.partial"
        self._file: TextIO = open(self._partial, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.exists(self._partial) or not os.path.samestat(os.stat(self._partial), os.fstat(self._fd)):
                raise BlockingIOError(None, "another process just finished it", path)  # the file is PATH by now
            self._file.truncate(0)
        except OSError:
            self._file.close()
            raise

    @property
    def _fd(self) -> int:
        return self._file.fileno()

    def write_line(self, line: str) -> None:
        """Writes a line without syncing it to disk. Raises OSError if the disk fails."""
        print(line, file=self._file, flush=True)

    def finish(self) -> None:
        """Renames the file to PATH. Raises FileExistsError if PATH exists by now, and OSError if the disk fails."""
        os.fsync(self._fd)
        if os.path.exists(self._path):
            raise FileExistsError(None, "it already exists", self._path)
        os.replace(self._partial, self._path)

    def close(self) -> None:
        """Closes the file, whether it was finished or not."""
        self._file.close()
