"""The cache: the count and mean value per code of all keys that have left the window, for every block of an update.

Block r attends to the cache before it. Chunk r, the L tokens that leave the window after block r, adds n_r keys and a
sum s_r of values per code, only from the document of its last token, D_r. With this rule for documents it is a linear
recurrence,

    N_{r+1} = [D_r = D_{r-1}] N_r + n_r          C_{r+1} = [D_r = D_{r-1}] C_r + s_r

and the means are C / N. The state keeps means and counts. Of several ways to solve it (docs/attention.md has the
measurements) two are kept: `cumulative`, unrolled, with each chunk's matmul starting from the total before it, which is
by far the fastest; and `serial`, a lax.scan over chunks, whose program does not grow with R.

Shapes: R blocks first, see attn.py.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tvq_pod.nn.scores import NEVER
from tvq_pod.nn.sequence import exclusive_scan, last_id_before, of_last_shard, varying_like

WRITTEN_OUT = 256  # the most chunks that `cumulative` unrolls; more take too long to compile, and use `serial`
NO_DOC = -1  # document id of empty window slots and empty caches


def initial_cache(batch_size: int, n_head: int, n_code: int, d_v: int) -> dict:
    """upper_div_lower [B, H, S, V] float32 (mean value per code), lower [B, H, S] float32 (count), latest_doc_id [B]
    int32. Float32, whatever the compute dtype: in bfloat16, 256 + 1 = 256."""
    return dict(
        upper_div_lower=jnp.zeros([batch_size, n_head, n_code, d_v], jnp.float32),
        lower=jnp.zeros([batch_size, n_head, n_code], jnp.float32),
        latest_doc_id=jnp.full([batch_size], NO_DOC, jnp.int32),
    )


def log_counts(counts: jax.Array) -> jax.Array:
    """log(counts), with a very negative number where a count is 0; exp() of the result gives the counts."""
    return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1.0)), NEVER)


def caches(cache: dict, leaving: dict, reduction: str, axis: str | None = None) -> tuple[dict, dict]:
    """Computes the cache that each block attends to, and the one after the update.

    cache: see `initial_cache`; before the update. leaving: the chunks, z int32 [R, B, H, L], v [R, B, H, L, V], doc_ids
    int32 [R, B, L]. Returns a dict of arrays like `cache`'s with R in front, means in the dtype of v; and a dict like
    `cache`. axis: the mapped axis that blocks are sharded over; then `cache` has this device's part of the codes.
    """
    if axis:
        return _caches_of_shard(cache, leaving, reduction, axis)
    mean, lower, values = cache["upper_div_lower"], cache["lower"], leaving["v"]
    latest, keep, z, all_counts = count_leaving(cache["latest_doc_id"], lower, leaving, reduction)
    sums, last_sum = _running_sums(mean, lower, keep, z, values, _is_written_out(reduction, len(values)))
    share = (1.0 / jnp.maximum(all_counts, 1.0)).at[0].set(1.0)[..., None]  # the first is already a mean
    before = dict(
        upper_div_lower=(sums * share[:-1]).astype(values.dtype),
        lower=all_counts[:-1],
        latest_doc_id=latest[:-1],
    )
    after = dict(upper_div_lower=last_sum * share[-1], lower=all_counts[-1], latest_doc_id=latest[-1])
    return before, after


def _caches_of_shard(cache: dict, leaving: dict, reduction: str, axis: str) -> tuple[dict, dict]:
    """Computes `caches` from zero, and adds the cache after the earlier shards."""
    values = leaving["v"]
    latest, keep, z, all_counts, new_lower = counts_of_shard(cache, leaving, reduction, axis)
    no_counts = jnp.zeros_like(all_counts[0])
    no_sums = varying_like(jnp.zeros([*no_counts.shape, values.shape[-1]], jnp.float32), values)
    sums, last_sum = _running_sums(no_sums, no_counts, keep, z, values, _is_written_out(reduction, len(values)))
    first_sum = cache["upper_div_lower"] * cache["lower"][..., None]
    sums_before, new_sum = exclusive_scan(first_sum, last_sum, latest[-1] == latest[0], axis)
    reach = (latest[:-1] == latest[:1])[..., None, None, None]  # ids never decrease
    sums += reach * sums_before[None]
    before = dict(
        upper_div_lower=(sums / jnp.maximum(all_counts[:-1], 1.0)[..., None]).astype(values.dtype),
        lower=all_counts[:-1],
        latest_doc_id=latest[:-1],
    )
    after = dict(
        upper_div_lower=new_sum / jnp.maximum(new_lower, 1.0)[..., None],
        lower=new_lower,
        latest_doc_id=of_last_shard(latest[-1], axis),
    )
    return before, after


def counts_of_shard(cache: dict, leaving: dict, reduction: str, axis: str):
    """`count_leaving` for a shard, including the counts of earlier shards; and the counts after the last shard, for
    this device's part of the codes. cache, axis: see `caches`."""
    lower = cache["lower"]
    first_id = last_id_before(cache["latest_doc_id"], leaving["doc_ids"][-1, :, -1], axis)
    n_code = lower.shape[-1] * jax.lax.axis_size(axis)
    no_counts = varying_like(jnp.zeros([*lower.shape[:-1], n_code], jnp.float32), leaving["z"])
    latest, keep, z, counts = count_leaving(first_id, no_counts, leaving, reduction)
    reach = latest == latest[:1]  # earlier counts are kept: ids never decrease
    before, after = exclusive_scan(lower, counts[-1], reach[-1], axis)
    return latest, keep, z, counts + reach[..., None, None] * before[None], after


def count_leaving(latest_doc_id, lower, leaving: dict, reduction: str):
    """Counts the tokens of chunks, z [R, B, H, L] and doc_ids [R, B, L].

    Returns latest [1 + R, B], the document after 0, 1 .. R chunks; keep bool [R, B], whether the cache before a chunk
    is kept; z, -1 where a token is not counted; and the counts, float32 [1 + R, B, H, S].
    """
    ids = leaving["doc_ids"]
    latest = jnp.concatenate([latest_doc_id[None], ids[:, :, -1]])
    keep = latest[1:] == latest[:-1]  # [R, B]
    counted = (ids == ids[:, :, -1:]) & (ids != NO_DOC)  # only each chunk's last document
    z = jnp.where(counted[:, :, None], leaving["z"], -1)  # -1: no code
    code = jnp.arange(lower.shape[-1], dtype=z.dtype).reshape(1, 1, 1, -1, 1)
    counts = checkpoint_name(jnp.sum(z[:, :, :, None, :] == code, axis=-1, dtype=jnp.float32), "projected")
    return latest, keep, z, _running_counts(lower, keep, counts, _is_written_out(reduction, len(ids)))


def _is_written_out(reduction: str, n_chunks: int) -> bool:
    return reduction == "cumulative" and n_chunks <= WRITTEN_OUT


def _kept(keep, totals):
    """The totals [B, ...] where keep [B] is True, 0 elsewhere."""
    return jnp.where(keep.reshape(keep.shape + (1,) * (totals.ndim - 1)), totals, 0.0)


def _chunk_sum(z, values, n_code: int):
    """The sums s [..., B, H, S, V], float32, of values [..., B, H, L, V] by their codes [..., B, H, L]."""
    onehot = jax.nn.one_hot(z, n_code, dtype=values.dtype)
    return jnp.einsum("...bhls,...bhlv->...bhsv", onehot, values, preferred_element_type=jnp.float32)


# --- first [B, ...], keep [R, B], and terms [R, B, ...] or their operands -> the running totals 0 .. R ----------------


def _running_counts(first, keep, counts, written_out: bool):
    """The running totals [1 + R, B, H, S] of counts [R, B, H, S]. They are sums of integers, so exact."""
    if not written_out:
        _, totals = jax.lax.scan(lambda total, chunk: (_kept(chunk[0], total) + chunk[1],) * 2, first, (keep, counts))
        return jnp.concatenate([first[None], totals])
    n_chunks = len(counts)
    segment = jnp.cumsum(~keep, axis=0)
    same = (segment[:, None] == segment[None, :]) & jnp.tril(jnp.ones([n_chunks, n_chunks], bool))[..., None]
    totals = jnp.einsum("rqb,qbhs->rbhs", same.astype(jnp.float32), counts, precision="highest")
    return jnp.concatenate([first[None], totals + jnp.cumprod(keep, axis=0)[..., None, None] * first[None]])


def _running_sums(mean, lower, keep, z, values, written_out: bool):
    """The running sums of values [R, B, H, L, V] by their codes z [R, B, H, L], after lower [B, H, S] values with mean
    `mean` [B, H, S, V]. Returns the mean and C_1 .. C_{R-1}, stacked; and C_R."""
    first, n_code = mean * lower[..., None], lower.shape[-1]

    def step(total, chunk):
        keep, z, values = chunk
        total = _kept(keep, total) + _chunk_sum(z, values, n_code)
        return total, total

    if not written_out:
        last, totals = jax.lax.scan(step, first, (keep, z, values))
        return jnp.concatenate([mean[None], totals[:-1]]), last
    totals = [first]
    # split, not indexed: its gradient is one concatenation, not a sum of R padded arrays
    for r, chunk in enumerate(jax.lax.split(values, [1] * len(values))):
        totals.append(step(totals[-1], (keep[r], z[r], chunk[0]))[0])
    return jnp.stack([mean, *totals[1:-1]]), totals[-1]
