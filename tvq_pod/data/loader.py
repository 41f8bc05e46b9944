"""From a plan to global arrays: each process reads its rows ahead, in threads, and joins them with the others'."""

import contextlib
from collections.abc import Iterator

import grain
import jax

from tvq_pod.data.store import Split
from tvq_pod.data.streams import Plan, RowSource
from tvq_pod.parallel.sharding import batch_sharding


def local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The global rows that a process reads: an equal, contiguous share."""
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def host_batches(
    split: Split, plan: Plan, rows: range, *, update_len: int, first_step: int, last_step: int, threads: int, ahead: int
) -> Iterator[dict]:
    """Batches of the given rows, as NumPy arrays [len(rows), T], for steps first_step .. last_step - 1.

    threads read them; up to `ahead` batches wait to be used.
    """
    source = RowSource(split.tokens, plan, rows, update_len, first_step, last_step)
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
) -> Iterator[dict]:
    """Batches of all rows as global arrays [B, T], rows over the mesh's data axis: inputs, targets, doc_ids int32,
    loss_mask float32. See `read_row` for their meaning."""
    rows = local_rows(batch_size, jax.process_index(), jax.process_count())
    sharding = batch_sharding(mesh)
    batches = host_batches(
        split,
        plan,
        rows,
        update_len=update_len,
        first_step=first_step,
        last_step=last_step,
        threads=threads,
        ahead=ahead,
    )
    with contextlib.closing(batches):
        for batch in batches:
            yield {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
