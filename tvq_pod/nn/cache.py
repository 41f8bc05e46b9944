"""The cache: counts and mean values per code of all keys that have left the window, for every block of an update.

Block r looks at the cache as it was before it. Chunk r, the L tokens that leave the window after block r, adds n_r keys
and a sum s_r of values per code, those of the document of its last token, D_r. With the rule for documents this is a
linear recurrence,

    N_{r+1} = [D_r = D_{r-1}] N_r + n_r          C_{r+1} = [D_r = D_{r-1}] C_r + s_r

which `REDUCTIONS` solve in different ways; the means are C / N. The state keeps means and counts.

Shapes: R blocks first, see attn.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NO_DOC = -1  # document id of an empty window slot and of an empty cache


def initial_cache(batch_size: int, n_head: int, n_code: int, d_v: int) -> dict:
    """upper_div_lower [B, H, S, V] float32 (mean value per code), lower [B, H, S] float32 (count), latest_doc_id [B]
    int32. Float32, whatever the compute dtype: in bfloat16, 256 + 1 = 256."""
    return dict(
        upper_div_lower=jnp.zeros([batch_size, n_head, n_code, d_v], jnp.float32),
        lower=jnp.zeros([batch_size, n_head, n_code], jnp.float32),
        latest_doc_id=jnp.full([batch_size], NO_DOC, jnp.int32),
    )


def caches(cache: dict, leaving: dict, reduction: str) -> tuple[dict, dict]:
    """The cache that each block meets, and the one that the update leaves behind.

    cache: see `initial_cache`; before the update. leaving: the chunks, z int32 [R, B, H, L], v [R, B, H, L, V], doc_ids
    int32 [R, B, L]. Returns a dict of arrays like `cache`'s with R in front, means in the dtype of v; and a dict like
    `cache`.
    """
    mean, lower = cache["upper_div_lower"], cache["lower"]
    ids, values = leaving["doc_ids"], leaving["v"]
    latest = jnp.concatenate([cache["latest_doc_id"][None], ids[:, :, -1]])  # [1 + R, B]
    keep = latest[1:] == latest[:-1]  # [R, B]
    counted = (ids == ids[:, :, -1:]) & (ids != NO_DOC)  # of each chunk's last document
    z = jnp.where(counted[:, :, None], leaving["z"], -1)  # -1: no code
    code = jnp.arange(lower.shape[-1], dtype=z.dtype).reshape(1, 1, 1, -1, 1)
    counts = checkpoint_name(jnp.sum(z[:, :, :, None, :] == code, axis=-1, dtype=jnp.float32), "projected")
    all_counts = _running_totals(lower, keep, counts)  # [1 + R, B, H, S]
    sums, last_sum = REDUCTIONS[reduction](mean, lower, keep, z, values)
    share = (1.0 / jnp.maximum(all_counts, 1.0)).at[0].set(1.0)[..., None]  # the first is a mean already
    before = dict(
        upper_div_lower=(sums * share[:-1]).astype(values.dtype),
        lower=all_counts[:-1],
        latest_doc_id=latest[:-1],
    )
    after = dict(upper_div_lower=last_sum * share[-1], lower=all_counts[-1], latest_doc_id=latest[-1])
    return before, after


def _running_totals(first, keep, terms):
    """first [B, ...], keep [R, B], terms [R, B, ...] -> [1 + R, B, ...]."""
    totals = [first]
    for r in range(len(terms)):
        totals.append(_kept(keep[r], totals[-1]) + terms[r])
    return jnp.stack(totals)


def _kept(keep, totals):
    """totals [B, ...] where keep [B], 0 elsewhere."""
    return jnp.where(keep.reshape(keep.shape + (1,) * (totals.ndim - 1)), totals, 0.0)


def _chunk_sum(z, values, n_code: int):
    """s [..., B, H, S, V], float32: of values [..., B, H, L, V] by their codes [..., B, H, L]."""
    onehot = jax.nn.one_hot(z, n_code, dtype=values.dtype)
    return jnp.einsum("...bhls,...bhlv->...bhsv", onehot, values, preferred_element_type=jnp.float32)


# --- mean [B, H, S, V] and lower [B, H, S] before the update, keep [R, B], z [R, B, H, L], values [R, B, H, L, V] ->
# --- the mean and C_1 .. C_{R-1}, stacked; C_R -----------------------------------------------------------------------


def _serial(mean, lower, keep, z, values):
    """By lax.scan over chunks."""

    def step(total, chunk):
        keep, z, values = chunk
        total = _kept(keep, total) + _chunk_sum(z, values, lower.shape[-1])
        return total, total

    last, totals = jax.lax.scan(step, mean * lower[..., None], (keep, z, values))
    return jnp.concatenate([mean[None], totals[:-1]]), last


def _cumulative(mean, lower, keep, z, values):
    """Written out: each chunk's matmul starts from the total before it."""
    totals = []
    for r in range(len(values)):
        before = totals[-1] if totals else mean * lower[..., None]
        totals.append(_kept(keep[r], before) + _chunk_sum(z[r], values[r], lower.shape[-1]))
    return jnp.stack([mean, *totals[:-1]]), totals[-1]


def _matmul(mean, lower, keep, z, values):
    """All sums at once, added up by a triangular matrix of zeros and ones."""
    n_chunks = len(values)
    segment = jnp.cumsum(~keep, axis=0)
    same = (segment[:, None] == segment[None, :]) & jnp.tril(jnp.ones([n_chunks, n_chunks], bool))[..., None]
    sums = _chunk_sum(z, values, lower.shape[-1])
    totals = jnp.einsum("rqb,qb...->rb...", same.astype(jnp.float32), sums, precision="highest")
    totals += jnp.stack([_kept(kept, mean * lower[..., None]) for kept in jnp.cumprod(keep, axis=0)])
    return jnp.concatenate([mean[None], totals[:-1]]), totals[-1]


def _assoc_scan(mean, lower, keep, z, values):
    """By a tree of joins."""

    def join(a, b):
        return a[0] & b[0], jax.vmap(_kept)(b[0], a[1]) + b[1]

    kept, totals = jax.lax.associative_scan(join, (keep, _chunk_sum(z, values, lower.shape[-1])))
    totals += jnp.stack([_kept(k, mean * lower[..., None]) for k in kept])
    return jnp.concatenate([mean[None], totals[:-1]]), totals[-1]


REDUCTIONS: dict[str, Callable] = dict(serial=_serial, cumulative=_cumulative, matmul=_matmul, assoc_scan=_assoc_scan)
