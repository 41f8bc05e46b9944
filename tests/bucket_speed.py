"""How fast rows come from a store in a bucket. Not a test: `python -m tests.bucket_speed --workdir=DIR` prints a table.

The bucket is a server on loopback that answers reads as Google Cloud Storage does, each after a pause. Documents are of
100 to 1,000 tokens, so a row of 2,048 tokens reads several places of a shard that are far apart.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.parse

import numpy as np
from etils import epath

from launch.local import free_port
from tests.data.made_streams import made_streams
from tvq_pod.config.settings import DataSettings, MeshSettings
from tvq_pod.data.loader import Feed
from tvq_pod.data.schedule import GROUPED
from tvq_pod.data.store import TokenStore
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.data.writer import StoreWriter
from tvq_pod.parallel.mesh import make_mesh

BATCH_SIZE, UPDATE_LEN = 128, 2048
THREADS, AHEAD = DataSettings().num_threads, DataSettings().prefetch_batches
LENGTHS = 100, 1000  # of documents, in tokens: uniform between these
NEEDED = 241_764  # tokens/s of configs/enwik8.py on eight v5e chips, as plan predicts (docs/large_corpora.md)


def write(folder: pathlib.Path, n_tokens: int) -> None:
    """A store of random bytes. They do not compress, so nothing is cheaper to fetch than text would be."""
    rng, written = np.random.default_rng(0), 0
    with StoreWriter(folder, ByteVocab(), dict(source="made up", format="text")) as writer:
        while written < n_tokens:
            length = int(rng.integers(*LENGTHS))
            writer.splits["train"].append(rng.integers(3, 259, length - 1).astype(np.uint16))
            writer.splits["train"].end(length - 1)
            written += length
        writer.finish()


async def serve(folder: pathlib.Path, port: int, seconds: float) -> None:
    """Answers reads of gs://bucket/..., which are files of the folder, each after so many seconds."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(seconds)
                writer.write(_answer(folder, head.decode()))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def _answer(folder: pathlib.Path, head: str) -> bytes:
    request = urllib.parse.urlparse(head.split(" ", 2)[1])
    path = folder / urllib.parse.unquote(request.path.split("/o/", 1)[1])
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    try:
        size = os.fstat(descriptor).st_size
        if "alt=media" not in request.query:
            content = json.dumps(dict(name=path.name, size=str(size), generation="1")).encode()
            return f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        begin, end = 0, size
        if asked := re.search(r"(?im)^range: bytes=(\d*)-(\d*)", head):
            begin = int(asked[1]) if asked[1] else size - int(asked[2])
            end = int(asked[2]) + 1 if asked[1] and asked[2] else size
        content = os.pread(descriptor, end - begin, begin)
        status = "206 Partial Content" if asked else "200 OK"
        fields = f"Content-Range: bytes {begin}-{end - 1}/{size}\r\nx-goog-generation: 1\r\n"
        return f"HTTP/1.1 {status}\r\n{fields}Content-Length: {len(content)}\r\n\r\n".encode() + content
    finally:
        os.close(descriptor)


def measure(folder: pathlib.Path, steps: int) -> None:
    """Prints rows a second, once as many batches were taken as are read ahead, and seconds until the first."""
    began = time.monotonic()
    store = TokenStore(folder / "store")
    # store.json and what it says of the arrays come from the disk, since only TensorStore reads from this server.
    store.parts = [dataclasses.replace(part, arrays={}, crc32c=None) for part in store.parts]
    store.path = epath.Path("gs://bucket/store")
    split = store.split("train")
    plan = made_streams(split, BATCH_SIZE, version=GROUPED)
    feed = Feed(split, plan, make_mesh(MeshSettings()), BATCH_SIZE, UPDATE_LEN, threads=THREADS, ahead=AHEAD)
    batches = feed.host_batches(range(BATCH_SIZE), 0, 2 * AHEAD + steps)
    next(batches)
    first = time.monotonic() - began
    for _ in range(AHEAD):
        next(batches)
    began = time.monotonic()
    for _ in range(steps):
        next(batches)
    print(steps * BATCH_SIZE / (time.monotonic() - began), first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--milliseconds", default="0,20")
    parser.add_argument("--tokens", type=float, default=2e9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--serve", nargs=2, type=float, help="port, and seconds; in this process")
    parser.add_argument("--measure", action="store_true", help="in this process")
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.workdir, int(given.serve[0]), given.serve[1]))
    if given.measure:
        measure(given.workdir, given.steps)
        return
    if not TokenStore.exists(given.workdir / "store"):
        write(given.workdir / "store", int(given.tokens))
    command = [sys.executable, "-m", "tests.bucket_speed", f"--workdir={given.workdir}", f"--steps={given.steps}"]
    for pause in map(float, given.milliseconds.split(",")):
        port = free_port()
        server = subprocess.Popen([*command, "--serve", str(port), str(pause / 1000)])
        try:
            environment = os.environ | dict(TENSORSTORE_GCS_HTTP_URL=f"http://127.0.0.1:{port}")
            time.sleep(3)
            done = subprocess.run(
                [*command, "--measure"], env=environment, stdout=subprocess.PIPE, check=True, text=True
            )
        finally:
            server.kill()
        rows, first = map(float, done.stdout.split())
        tokens = rows * UPDATE_LEN
        print(
            f"{pause:.0f} ms: first batch after {first:.1f} s, then {rows:,.0f} rows/s, "
            f"{tokens / NEEDED:.1f} times what eight v5e chips need",
            flush=True,
        )


if __name__ == "__main__":
    main()
