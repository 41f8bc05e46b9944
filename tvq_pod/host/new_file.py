"""A text file that has its name only once it is complete."""

import fcntl
import os
from typing import TextIO


class NewFile:
    """Lines go to PATH.partial, which becomes PATH at the end. A process that is killed leaves PATH.partial, and the
    next one replaces it."""

    def __init__(self, path: str):
        """Raises BlockingIOError if another process writes the file now, and what the disk does."""
        self._path, self._partial = path, f"{path}.partial"
        self._file: TextIO = open(self._partial, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.exists(self._partial) or not os.path.samestat(os.stat(self._partial), os.fstat(self._fd)):
                raise BlockingIOError(None, "another process just finished it", path)  # it is PATH by now
            self._file.truncate(0)
        except OSError:
            self._file.close()
            raise

    @property
    def _fd(self) -> int:
        return self._file.fileno()

    def write_line(self, line: str) -> None:
        """Writes a line, and leaves it to the kernel. Raises what the disk does."""
        print(line, file=self._file, flush=True)

    def finish(self) -> None:
        """Gives the file its name. Raises FileExistsError if there is such a file by now, and what the disk does."""
        os.fsync(self._fd)
        if os.path.exists(self._path):
            raise FileExistsError(None, "it exists by now", self._path)
        os.replace(self._partial, self._path)

    def close(self) -> None:
        """Ends writing, whether the file was finished or not."""
        self._file.close()
