"""Global batches: each process reads the rows of a plan ahead, in threads, and joins them with the others'."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence

import grain
import jax
import numpy as np

from tvq_pod.data.store import Split
from tvq_pod.data.streams import BatchSource, Plan
from tvq_pod.parallel.sharding import batch_sharding


def local_part(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> tuple[list[int], list[range]]:
    """Returns the rows, and the ranges of tokens, of a global batch [B, T] that this process's devices hold, in order.

    A host of a TPU slice is a rectangle of chips: its tokens need not be one range.
    """
    indices = [index for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    rows = sorted({row for row_slice, _ in indices for row in range(*row_slice.indices(shape[0]))})
    tokens = sorted({token_slice.indices(shape[1])[:2] for _, token_slice in indices})
    return rows, [range(begin, end) for begin, end in tokens]


def joined(
    sharding: jax.sharding.Sharding, shape: tuple[int, int], rows: list[int], tokens: list[range], part: np.ndarray
):
    """Returns the global array [B, T]. part: this process's rows, with its ranges of tokens concatenated."""
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


@dataclasses.dataclass(frozen=True)
class Feed:
    """All that is needed to feed the devices. split: the tokens to read. plan: what each row reads of them. mesh: where
    batches [B, T] of batch_size rows and update_len tokens are placed. threads: the number that read. ahead: how many
    batches are read ahead. update_of: which update of the rows a step reads (see Phase); None: step n reads update n.
    cuts_of: how many contexts have ended before a step (see Phase); None: none."""

    split: Split
    plan: Plan
    mesh: jax.sharding.Mesh
    batch_size: int
    update_len: int
    threads: int
    ahead: int
    update_of: Callable[[int], int] | None = None
    cuts_of: Callable[[int], int] | None = None

    def host_batches(
        self, rows: Sequence[int], first_step: int, last_step: int, tokens: Sequence[range] | None = None
    ) -> Generator[dict, None, None]:
        """Yields batches of some rows, as NumPy arrays [len(rows), T], for steps first_step .. last_step - 1.

        tokens: the ranges of the T tokens to read; None reads all.
        """
        steps = first_step, last_step, tokens, self.update_of, self.cuts_of
        source = BatchSource(self.split.tokens, self.plan, rows, self.update_len, *steps)
        dataset = grain.MapDataset.source(source)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead)
        with contextlib.closing(iter(dataset.to_iter_dataset(options))) as batches:  # also when the caller stops early
            yield from batches

    def batches(self, first_step: int, last_step: int) -> Generator[dict, None, None]:
        """Yields batches of all rows as global arrays [B, T], sharded over the mesh: inputs, targets, doc_ids int32,
        loss_mask float32. See `read_row` for their meaning."""
        sharding, shape = batch_sharding(self.mesh), (self.batch_size, self.update_len)
        rows, tokens = local_part(sharding, shape)
        with contextlib.closing(self.host_batches(rows, first_step, last_step, tokens)) as batches:
            for batch in batches:
                yield {name: joined(sharding, shape, rows, tokens, array) for name, array in batch.items()}
