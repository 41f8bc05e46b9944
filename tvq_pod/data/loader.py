"""From a plan to global arrays: each process reads its rows ahead, in threads, and joins them with the others'."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np

from tvq_pod.data.store import Split
from tvq_pod.data.streams import Plan, RowSource
from tvq_pod.parallel.sharding import batch_sharding


def local_part(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> tuple[list[int], list[range]]:
    """The rows, and the ranges of tokens, of a global batch [B, T] that this process's devices hold, both in order.

    A host of a TPU slice is a rectangle of chips: its tokens need not be one range.
    """
    indices = sharding.addressable_devices_indices_map(shape).values()
    rows = sorted({row for row_slice, _ in indices for row in range(*row_slice.indices(shape[0]))})
    tokens = sorted({token_slice.indices(shape[1])[:2] for _, token_slice in indices})
    return rows, [range(begin, end) for begin, end in tokens]


def joined(
    sharding: jax.sharding.Sharding, shape: tuple[int, int], rows: list[int], tokens: list[range], part: np.ndarray
):
    """The global array [B, T] of which this process has `part`: its rows, and its ranges of tokens end to end."""
    first_row = {row: place for place, row in enumerate(rows)}
    bounds = np.cumsum([0, *map(len, tokens)])
    first_token = {range_.start: int(bound) for range_, bound in zip(tokens, bounds, strict=False)}

    def of_device(index):
        row_slice, token_slice = index
        row, row_end, _ = row_slice.indices(shape[0])
        token, token_end, _ = token_slice.indices(shape[1])
        row_at, token_at = first_row[row], first_token[token]
        return part[row_at : row_at + row_end - row, token_at : token_at + token_end - token]

    return jax.make_array_from_callback(shape, sharding, of_device)


def host_batches(
    split: Split,
    plan: Plan,
    rows: Sequence[int],
    *,
    update_len: int,
    first_step: int,
    last_step: int,
    threads: int,
    ahead: int,
    tokens: Sequence[range] | None = None,
    update_of: Callable[[int], int] | None = None,
) -> Iterator[dict]:
    """Batches of the given rows, as NumPy arrays [len(rows), T], for steps first_step .. last_step - 1.

    threads read them; up to `ahead` batches wait to be used. tokens: ranges of the T that are read; None reads all.
    update_of: which update of the streams a step reads (see Phase); None: step n reads update n.
    """
    source = RowSource(split.tokens, plan, rows, update_len, first_step, last_step, tokens, update_of)
    dataset = grain.MapDataset.source(source).batch(len(rows))
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))
    try:
        yield from iterator
    finally:  # also when the caller is done before the end
        iterator.close()


def global_batches(
    split: Split,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    update_len: int,
    first_step: int,
    last_step: int,
    threads: int,
    ahead: int,
    update_of: Callable[[int], int] | None = None,
) -> Iterator[dict]:
    """Batches of all rows as global arrays [B, T], spread over the mesh: inputs, targets, doc_ids int32, loss_mask
    float32. See `read_row` for their meaning."""
    sharding, shape = batch_sharding(mesh), (batch_size, update_len)
    rows, tokens = local_part(sharding, shape)
    batches = host_batches(
        split,
        plan,
        rows,
        update_len=update_len,
        first_step=first_step,
        last_step=last_step,
        threads=threads,
        ahead=ahead,
        tokens=tokens,
        update_of=update_of,
    )
    with contextlib.closing(batches):
        for batch in batches:
            yield {name: joined(sharding, shape, rows, tokens, array) for name, array in batch.items()}
