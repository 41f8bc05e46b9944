"""Writing one array of a token store, a shard at a time."""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator

import numpy as np
import tensorstore
from etils import epath

from tvq_pod.data import store as stores
from tvq_pod.data.store import kvstore
from tvq_pod.errors import UserError

IN_FLIGHT = 2  # shards of an array that are being compressed and written


class ArrayWriter:
    """Appends to a one-dimensional zarr3 array, a shard at a time, compressed and hashed in threads; memory use is a
    few shards."""

    def __init__(
        self,
        path: epath.PathLike,
        dtype: np.dtype,
        threads: concurrent.futures.Executor,
        written: dict | None = None,
    ):
        """written: what `commit` returned; the array is cut to that length and continued. Raises ValueError if that is
        impossible."""
        self._dtype = np.dtype(dtype)
        self._shard_len = stores.SHARD_BYTES // self._dtype.itemsize
        self._threads = threads
        self._digests: list[bytes] = []  # SHA-256 of each full shard's elements, little-endian
        self._waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        self._buffer, self._n = np.empty(self._shard_len, self._dtype), 0  # elements of the last shard
        self.length = 0  # elements given so far
        if written is None:
            self._array = tensorstore.open(self._spec(path)).result()
            return
        spec = {"driver": "zarr3", "kvstore": kvstore(path), "fill_missing_data_reads": False}
        self._array = tensorstore.open(spec, read=True, write=True).result()
        self.length = written["length"]
        if self._array.shape[0] < self.length:
            raise ValueError(f"{path} is shorter than progress.json says")
        self._digests = [bytes.fromhex(digest) for digest in written["shards"]]
        self._n = self.length % self._shard_len
        self._buffer[: self._n] = self._array[self.length - self._n : self.length].read().result()
        with named_errors():
            self._array = self._array.resize(exclusive_max=[self.length]).result()

    def _spec(self, path: epath.PathLike) -> dict:
        inner = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": stores.ZSTD_LEVEL}},
            {"name": "crc32c"},
        ]
        sharding = {"chunk_shape": [stores.CHUNK_BYTES // self._dtype.itemsize], "codecs": inner}
        return {
            "driver": "zarr3",
            "kvstore": kvstore(path),
            "metadata": {
                "data_type": self._dtype.name,
                "shape": [0],
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self._shard_len]}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "fill_value": 0,
            },
            "create": True,
            "delete_existing": True,
            "store_data_equal_to_fill_value": True,
        }

    def append(self, values: np.ndarray) -> None:
        """Adds values [n]; they are cast to the array's dtype."""
        at = 0
        while at < len(values):
            n = min(len(values) - at, self._shard_len - self._n)
            self._buffer[self._n : self._n + n] = values[at : at + n]
            self._n += n
            at += n
            if self._n == self._shard_len:
                self._write_full()
        self.length += len(values)

    def add(self, value: int) -> None:
        """Adds one value: faster than an array of one."""
        self._buffer[self._n] = value
        self._n += 1
        self.length += 1
        if self._n == self._shard_len:
            self._write_full()

    def _write_full(self) -> None:
        begin = self._shard_len * (len(self._digests) + len(self._waiting))
        self._resize(begin + self._shard_len)
        self._waiting.append(self._threads.submit(self._write, self._array, begin, self._buffer))
        self._buffer, self._n = np.empty(self._shard_len, self._dtype), 0
        if len(self._waiting) > IN_FLIGHT:
            self._digests.append(self._waiting.popleft().result())

    def _resize(self, length: int) -> None:
        with named_errors():
            self._array = self._array.resize(exclusive_max=[length], expand_only=True).result()

    def _write(self, array: tensorstore.TensorStore, begin: int, values: np.ndarray) -> bytes:
        with named_errors():
            # Elements that were given are never changed, so they need not be copied.
            place = array[begin : begin + len(values)]
            written = place.write(values, can_reference_source_data_indefinitely=True)
            digest = self._digest(values)
            written.result()
        return digest

    def _digest(self, values: np.ndarray) -> bytes:
        return hashlib.sha256(values.astype(self._dtype.newbyteorder("<"), copy=False).data).digest()

    def commit(self) -> dict:
        """Writes all values so far. Returns what is needed to resume from here."""
        while self._waiting:
            self._digests.append(self._waiting.popleft().result())
        if self._n:
            begin = self._shard_len * len(self._digests)
            self._resize(begin + self._n)
            self._write(self._array, begin, self._buffer[: self._n])
        return dict(length=self.length, shards=[digest.hex() for digest in self._digests])

    def close(self) -> bytes:
        """Writes what is left. Returns the SHA-256 of the digests of all shards."""
        self.commit()
        last = [self._digest(self._buffer[: self._n])] if self._n else []
        return hashlib.sha256(b"".join(self._digests + last)).digest()


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Turns a failed write inside the block into a UserError that names the setting."""
    try:
        yield
    except (OSError, ValueError) as error:
        is_full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        remedy = "make room, or give another" if is_full else "give a folder that can be written"
        raise UserError(f"config.data.store: can't be written ({str(error)[-200:]}); {remedy}") from error
