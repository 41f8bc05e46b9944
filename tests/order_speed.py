"""What the order of documents costs. Not a test: `python -m tests.order_speed --workdir=DIR` prints a table.

For each number of documents: seconds from opening a split until the first batch, and until a batch in the fifth epoch,
the most memory of the process, and the speed from then on, each in a process of its own; and how far documents that are
neighbors in the corpus are from each other in the stream. Where documents begin is on disk, as in a store; their tokens
are made up when they are read, so that a corpus of 10^9 documents needs no disk for them.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import tensorstore

from tests.data.made_streams import made_streams
from tvq_pod.config.settings import MeshSettings
from tvq_pod.data.arrays import ArrayWriter
from tvq_pod.data.groups import GROUP, DocumentStarts, group_bounds
from tvq_pod.data.loader import Feed
from tvq_pod.data.parted import joined
from tvq_pod.data.schedule import GROUPED, LISTED, STRETCHED
from tvq_pod.data.store import Part, Split, kvstore
from tvq_pod.parallel.mesh import make_mesh

BATCH_SIZE, UPDATE_LEN = 128, 2048
STEPS = 60
LENGTHS = 100, 1000  # of documents, in tokens: uniform between these


def write(folder: pathlib.Path, n_documents: int) -> None:
    """Where documents of random lengths begin, and where their groups do."""
    rng, at, groups = np.random.default_rng(0), 0, []
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        array = ArrayWriter(folder / "starts", np.dtype(np.int64), threads)
        for first in range(0, n_documents, GROUP):
            lengths = rng.integers(*LENGTHS, size=min(GROUP, n_documents - first))
            bounds = at + np.concatenate([[0], np.cumsum(lengths)])
            array.append(bounds[:-1])
            groups.append(at)
            at = int(bounds[-1])
        array.append(np.array([at]))
        array.close()
    (folder / "groups.json").write_text(json.dumps([*groups, at]))


def opened(folders: list[pathlib.Path]) -> Split:
    """The split, of which nothing is read yet but where groups begin; of several, their mixture in equal parts."""
    found = []
    for folder in folders:
        spec = {"driver": "zarr3", "kvstore": kvstore(folder / "starts")}
        starts = tensorstore.open(spec, read=True).result()
        tokens = np.array(json.loads((folder / "groups.json").read_text()), np.int64)
        found.append(DocumentStarts(starts, group_bounds(starts.shape[0] - 1, GROUP), tokens))
    documents = joined(found)

    def made_up(domain: tensorstore.IndexDomain, chunk: np.ndarray, _) -> None:
        chunk[...] = 7

    shape = [documents.n_tokens]
    values = tensorstore.virtual_chunked(made_up, dtype=np.uint16, shape=shape, chunk_layout=_chunks())
    sizes = [each.n_documents for each in found]
    firsts = itertools.accumulate(sizes[:-1], initial=0)
    parts = [Part(first, n, 1 / len(found)) for first, n in zip(firsts, sizes, strict=True)]
    return Split(values, documents, np.zeros(0, np.int64), tuple(parts) if len(parts) > 1 else ())


def _chunks() -> tensorstore.ChunkLayout:
    return tensorstore.ChunkLayout(read_chunk=tensorstore.ChunkLayout.Grid(shape=[2**15]))


def measure(folders: list[pathlib.Path], version: int, epoch: int) -> None:
    """Prints seconds until a batch, MB of memory, and tokens a second from then on."""
    began = time.monotonic()
    split = opened(folders)
    plan = made_streams(split, BATCH_SIZE, version=version)
    step = epoch * split.documents.n_tokens // BATCH_SIZE // UPDATE_LEN + 7 * (epoch > 0)
    feed = Feed(split, plan, make_mesh(MeshSettings()), BATCH_SIZE, UPDATE_LEN, threads=16, ahead=16)
    batches = feed.host_batches(range(BATCH_SIZE), step, step + STEPS)
    next(batches)
    first = time.monotonic()
    n_more = sum(1 for _ in batches)
    speed = n_more * BATCH_SIZE * UPDATE_LEN / (time.monotonic() - first)
    print(first - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, speed)


def neighbors(folder: pathlib.Path) -> str:
    """How far apart in the stream's line two documents are that follow each other in the corpus, in documents."""
    split = opened([folder])
    line = made_streams(split, 1)._order.epoch(0)
    firsts = np.sort(np.random.default_rng(0).integers(split.documents.n_documents - 1, size=2000))
    group = np.searchsorted(split.documents.documents, firsts, side="right") - 1
    bounds = np.cumsum(np.concatenate([[0], np.diff(split.documents.tokens)[line._order]]))
    begins = np.empty(split.documents.n_groups, np.int64)
    begins[line._order] = bounds[:-1]
    places = []
    for first, of in zip(firsts, group, strict=True):
        starts = split.documents.of_group(of)
        if first + 1 - split.documents.documents[of] >= len(starts) - 1:
            continue  # its neighbor is in another group
        own = {int(piece.start): n for n, piece in enumerate(line._line_of(of).pieces(0, int(starts[-1] - starts[0])))}
        at = first - split.documents.documents[of]
        places.append(abs(own[int(starts[at])] - own[int(starts[at + 1])]))
        if len(places) == 100:
            break
    low, middle, high = np.quantile(places, [0.25, 0.5, 0.75])
    return f"neighbors are {middle:,.0f} documents apart (quartiles {low:,.0f}, {high:,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--documents", default="1e6,1e8,1e9")
    parser.add_argument("--measure", nargs=2, type=int, help="order's version, and epoch; in this process")
    parser.add_argument("--mixture", action="store_true", help="of all of these, in place of each alone")
    given = parser.parse_args()
    sizes = [int(float(text)) for text in given.documents.split(",")]
    if given.measure:
        measure([given.workdir / str(n) for n in sizes], *given.measure)
        return
    for n_documents in sizes:
        if not (given.workdir / str(n_documents) / "groups.json").exists():
            write(given.workdir / str(n_documents), n_documents)
    for chosen in [sizes] if given.mixture else [[n] for n in sizes]:
        versions = (STRETCHED,) if given.mixture else (GROUPED, LISTED) if sum(chosen) <= 10**7 else (GROUPED,)
        for version, epoch in itertools.product(versions, (0, 4)):
            flags = [f"--workdir={given.workdir}", f"--documents={','.join(map(str, chosen))}"]
            command = [sys.executable, "-m", "tests.order_speed", *flags, "--measure", str(version), str(epoch)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds, memory, speed = map(float, done.stdout.split())
            where = f"{' + '.join(f'{n:,}' for n in chosen)} documents, version {version}, epoch {epoch}"
            print(f"{where}: {seconds:.2f} s, {memory:.0f} MB, then {speed / 1e6:.2f} million tokens/s", flush=True)
        if not given.mixture and sum(chosen) > GROUP:
            print(f"{sum(chosen):,} documents: {neighbors(given.workdir / str(sum(chosen)))}", flush=True)


if __name__ == "__main__":
    main()
