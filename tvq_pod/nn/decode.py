"""The recurrent step: one token for each row, on a state that is updated in place.

`model.py` reads any number of tokens at once. To read one, this module computes the same function with less memory
traffic, which limits the speed of a single token:

- the window is a ring of M + 1 slots: a new key and value overwrite the oldest, and no other data moves; - a value that
leaves the ring changes one row of the cache's means; - weights are cast, joined and unstacked only once
(`decode_weights`), and so is the table of relative biases.

All rows write the same slot at the same step, whatever their documents: the slot is a counter, not a position. Since
slots are not in order, the biases by distance are rotated by the slot's number. If rows begin at different times, each
may have a slot of its own: then the order of its sums, and so every bit of its output, does not depend on other rows.

The equations are those of `attn.py`, and its parameters are used as they are. The loop that draws tokens is in
`tvq_pod/inference/sampler.py`.

Shapes: B rows, Q query heads, H key heads, G = Q / H, M window, S codes, K key width, V value width, D model width.
"""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from tvq_pod.nn.attn import VQAttention, sharpness
from tvq_pod.nn.cache import NO_DOC, log_counts
from tvq_pod.nn.layers import RMSNorm, sinusoids
from tvq_pod.nn.model import embed
from tvq_pod.nn.scores import NEVER, as_last_axes
from tvq_pod.nn.types import UNITS, TransformerConfig

T = TypeVar("T")


def decode_weights(params: dict, config: TransformerConfig) -> dict:
    """The weights that `decode_step` takes, from the parameters of `Transformer(config)`, in the compute dtype: one
    dict for each unit, in order, under "units", and the embeddings. The codebook stays float32."""
    dtype = config.dtype
    weights = {name: leaf for name, leaf in params.items() if name != "layers"}
    weights |= {name: leaf.astype(dtype) for name, leaf in params.items() if name in ("embedding", "w_out")}
    units = []
    for layer in range(config.n_layer):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        for name in UNITS:
            attends = name in config.attention_units
            units.append((_attention_weights if attends else _mlp_weights)(own[name], config))
    return weights | dict(units=units)


def _attention_weights(params: dict, config: TransformerConfig) -> dict:
    c = config
    biases = cast(dict[str, jax.Array], VQAttention(c).apply({"params": params}, method="biases"))
    kernels = [params[name]["kernel"] for name in ("w_q", "w_k", "w_v", "w_g") if name in params]
    weights = dict(
        norm=params["norm"],
        w_in=jnp.concatenate([kernel.reshape(-1, c.d_model).astype(c.dtype) for kernel in kernels]),
        w_o=params["w_o"]["kernel"].astype(c.dtype),
        u=biases["u"].reshape(c.n_key_head, -1, c.d_k),
        v=biases["v"].reshape(c.n_key_head, -1, c.d_k),
        r=biases["r"][:, ::-1],  # farthest first
    )
    if c.temperature == "learned":
        factors = sharpness(params["log_sharpness"], c.dtype)
        weights["sharpness"] = factors.reshape(1, c.n_key_head, -1, 1)
    if c.key_shift:
        weights["shift"] = params["shift"].astype(c.dtype)
    if c.attn_type == "vq":
        codebook = params["quantizer"]["codebook"]
        weights |= dict(codebook=codebook, codes=biases["codes"])
        weights |= dict(half_sq_norms=0.5 * jnp.sum(jnp.square(codebook), axis=-1))
    return weights


def _mlp_weights(params: dict, config: TransformerConfig) -> dict:
    kernels = {name: params[name]["kernel"][0].astype(config.dtype) for name in ("w_up", "w_down")}
    return dict(norm=params["norm"], **kernels)


def decode_state(state: dict, config: TransformerConfig, slot_by_row: bool = False) -> dict:
    """The state of `decode_step` after the tokens that `state`, of `Transformer(config)`, has read.

    slot: int32 scalar, or [B] with slot_by_row, where the next token is written. doc_ids: int32 [B, M + 1], documents
    of the ring's tokens; NO_DOC for none. position, last_doc, cache_doc, leaving_doc: int32 [B], tokens read of the
    current document, its id, the cache's document, and the document of the token that left the ring last and is not in
    the cache yet. units: for each attention unit, k [B, H, M + 1, K] and v [B, H, M + 1, V], the ring, in `dtype`; with
    a cache also z int32 [B, H, M + 1]; leaving_z and leaving_v, of the token that left the ring last; and mean float32
    [B, H, S, V] and count float32 [B, H, S], the cache. Where a count is 0 the mean may be any finite number. With
    key_shift also before [B, H, K], see state.py.
    """
    first = jax.tree.map(lambda leaf: leaf[0], state[UNITS[0]])
    window_docs = first["xlcache"]["doc_ids"]
    none = jnp.full_like(window_docs[:, 0], NO_DOC)
    has_cache = config.attn_type == "vq" and config.agg_cache
    return dict(
        slot=jnp.full_like(none, config.mem_len) if slot_by_row else jnp.int32(config.mem_len),
        doc_ids=jnp.concatenate([window_docs, none[:, None]], axis=1),
        position=first["pos_offset"],
        last_doc=window_docs[:, -1],
        cache_doc=first["aggcache"]["latest_doc_id"] if has_cache else none,
        leaving_doc=jnp.array(none),
        units=[
            _unit_state(jax.tree.map(lambda leaf, layer=layer: leaf[layer], state[name]), has_cache)
            for layer in range(config.n_layer)
            for name in config.attention_units
        ],
    )


def _unit_state(state: dict, has_cache: bool) -> dict:
    def ring(window):  # [B, H, M, ...] and one free slot
        return jnp.concatenate([window, jnp.zeros_like(window[:, :, :1])], axis=2)

    window = state["xlcache"]
    ring_names = ("k_hat", "v", "z") if has_cache else ("k_hat", "v")
    own = {name.removesuffix("_hat"): ring(window[name]) for name in ring_names}
    if has_cache:
        own |= {f"leaving_{name}": jnp.zeros_like(window[name][:, :, 0]) for name in ("z", "v")}
        own |= dict(mean=state["aggcache"]["upper_div_lower"], count=state["aggcache"]["lower"])
    return own | ({"before": state["before"]} if "before" in state else {})


def decode_step(weights: dict, state: dict, tokens, doc_ids, config: TransformerConfig) -> tuple[dict, jax.Array]:
    """Reads one token of each row: tokens and doc_ids int32 [B], doc_ids never decreasing from step to step. Returns
    (next state, logits float32 [B, n_vocab])."""
    new_state, logits = _step(weights, _lean_state(state), tokens, doc_ids, config)
    return _full_state(new_state, len(tokens), config), logits


def decode_while(
    going: Callable, feed: Callable, take: Callable, weights: dict, state: dict, carry: T, config: TransformerConfig
) -> tuple[dict, T]:
    """Runs `decode_step` while going(carry), a boolean scalar, is True. feed(carry) -> (tokens, doc_ids), which are
    read next; take(carry, logits) -> the next carry. Returns (next state, carry). Every large array of the state is
    updated in place."""

    def step(loop):
        state, carry = loop
        tokens, doc_ids = feed(carry)
        state, logits = _step(weights, state, tokens, doc_ids, config)
        return state, take(carry, logits)

    state, carry = jax.lax.while_loop(lambda loop: going(loop[1]), step, (_lean_state(state), carry))
    return _full_state(state, len(state["position"]), config), carry


# XLA:CPU copies an array that was updated in place if its shape changes before it is read, as it does when axes of size
# 1 are dropped for a matrix product. So a loop's arrays do not have them from the start.
_AXES_BEHIND = dict(k=2, v=2, z=1, mean=2, count=1, leaving_z=0, leaving_v=1, before=1)  # number of axes after B and H


def _lean(x: jax.Array) -> jax.Array:
    """Drops the axes B and H of x [B, H, ...] if they have size 1."""
    return x.reshape(*(n for n in x.shape[:2] if n > 1), *x.shape[2:])


def _lean_state(state: dict) -> dict:
    return state | dict(units=jax.tree.map(_lean, state["units"]))


def _full_state(state: dict, batch_size: int, config: TransformerConfig) -> dict:
    def full(name, x):
        behind = x.shape[x.ndim - _AXES_BEHIND[name] :]
        return x.reshape(batch_size, config.n_key_head, *behind)

    return state | dict(units=[{name: full(name, x) for name, x in unit.items()} for unit in state["units"]])


def _step(weights: dict, state: dict, tokens, doc_ids, config: TransformerConfig) -> tuple[dict, jax.Array]:
    """Runs `decode_step` on a `_lean_state`. Every large array is written before it is read, so it needs no copy."""
    c = config
    x = embed(tokens, weights["embedding"])
    position = jnp.where(doc_ids == state["last_doc"], state["position"], 0)
    if c.pe_abs:
        x += (weights["pe_scale"] * sinusoids(position, c.d_model)).astype(c.dtype)
    docs = _Documents(state, doc_ids)
    units, states = [], iter(state["units"])
    for weight in weights["units"]:
        if "w_up" in weight:
            x += _mlp(weight, x, c)
        else:
            own, res = _attention(weight, next(states), x, docs, c)
            units.append(own)
            x += res
    if c.e_norm:
        x = _norm(weights["norm_out"], x, c)
    output = weights["embedding"].T if c.e_tie else weights["w_out"]
    new_state = docs.next_state | dict(position=position + 1, last_doc=doc_ids, units=units)
    return new_state, _einsum("bd,dn->bn", x, output) * c.e_scale


class _Documents:
    """The data that units share at one step: the document of each slot's token, and the update of every unit's cache.

    slot, next_slot: scalars or [B], written now and at the next step, when the token in `next_slot` leaves the ring.
    sees_slot bool [B, M + 1] and sees_cache bool [B]: which keys are in the query's document. keeps_cache bool [B]:
    whether the token that left last is in the cache's document. leaves bool [B]: whether there is such a token.
    continues bool [B]: whether the previous token was in the query's document.
    """

    def __init__(self, state: dict, doc_ids: jax.Array):
        slot = state["slot"]
        ring = _write(state["doc_ids"], doc_ids, slot, axis=1)
        self.slot, self.next_slot = slot, jnp.where(slot == ring.shape[1] - 1, 0, slot + 1)
        self.sees_slot = ring == doc_ids[:, None]
        self.continues = state["last_doc"] == doc_ids
        self.leaves = state["leaving_doc"] != NO_DOC
        cache_doc = jnp.where(self.leaves, state["leaving_doc"], state["cache_doc"])
        self.keeps_cache, self.sees_cache = cache_doc == state["cache_doc"], cache_doc == doc_ids
        leaving_doc = _read(ring, self.next_slot, axis=1)
        self.next_state = dict(slot=self.next_slot, doc_ids=ring, cache_doc=cache_doc, leaving_doc=leaving_doc)

    def slots(self, n_head: int) -> tuple[jax.Array, jax.Array]:
        """slot and next_slot, repeated for each head if each row has its own: [B, H] without axes of size 1."""
        if not self.slot.ndim:
            return self.slot, self.next_slot
        both = (jnp.broadcast_to(slot[:, None], (len(slot), n_head)) for slot in (self.slot, self.next_slot))
        slot, next_slot = map(_lean, both)
        return slot, next_slot

    def turned(self, near: jax.Array) -> jax.Array:
        """Puts near [B, H, G, M + 1], which has the farthest first, into the order of the slots."""
        if not self.slot.ndim:
            return jnp.roll(near, self.next_slot, axis=-1)
        return jax.vmap(functools.partial(jnp.roll, axis=-1))(near, self.next_slot)


def _attention(weights: dict, state: dict, x: jax.Array, docs: _Documents, c: TransformerConfig):
    """Runs one attention unit: x [B, D] -> its next state, and its output, which is added to x."""
    n_head, n_rows, scale = c.n_key_head, len(x), c.d_k**-0.25
    widths = (c.n_head * c.d_k, n_head * c.d_k, n_head * c.d_v)
    joined = _einsum("bd,nd->bn", _norm(weights["norm"], x, c), weights["w_in"]).astype(c.dtype)
    q, k, v, gate = jnp.split(joined, [widths[0], sum(widths[:2]), sum(widths)], axis=-1)
    q, k = q.reshape(n_rows, n_head, -1, c.d_k), k.reshape(n_rows, n_head, c.d_k)
    if c.key_shift:
        before = state["before"].reshape(k.shape)
        k += jnp.where(docs.continues[:, None, None], weights["shift"][None] * before, jnp.zeros([], c.dtype))
        state = state | dict(before=_lean(jnp.mean(q, axis=2)))
    q, k = (_norm(None, x, c) * scale for x in (q, k))
    if c.temperature == "learned":
        q *= weights["sharpness"]
    v = v.reshape(n_rows, n_head, c.d_v)
    if c.head_type == "shga":
        v, gate = nn.silu(v), nn.silu(gate)
    z = None
    if c.attn_type == "vq":
        dists = weights["half_sq_norms"][None] - _einsum("bhk,hsk->bhs", k.astype(jnp.float32), weights["codebook"])
        z = jnp.argmin(dists, axis=-1).astype(jnp.int32)
        k = jax.vmap(lambda z, codes: codes[z], in_axes=(1, 0), out_axes=1)(z, weights["codes"])

    slot, next_slot = docs.slots(n_head)
    state = state | {name: _write(state[name], _lean(x), slot, axis=-2) for name, x in (("k", k), ("v", v))}
    near = _einsum("bhgk,hdk->bhgd", q + weights["v"][None], weights["r"]) + c.window_bias
    near = docs.turned(near)
    q += weights["u"][None]
    near += _einsum("bhgk,bhmk->bhgm", q, state["k"])
    near = jnp.where(docs.sees_slot[:, None, None], near, NEVER)
    top = jnp.max(near, axis=-1, keepdims=True)
    far = None
    if z is not None and "mean" in state:
        written = _write(state["z"], _lean(z), slot, axis=-1)
        state |= dict(z=written, **_cache_with_leaving(state, docs, (n_rows, n_head)))
        far = _einsum("bhgk,hsk->bhgs", q, weights["codes"])
        far += log_counts(state["count"]).reshape(n_rows, n_head, 1, -1)
        far = jnp.where(docs.sees_cache[:, None, None, None], far, NEVER)
        top = jnp.maximum(top, jnp.max(far, axis=-1, keepdims=True))
    near = jnp.exp(near - top)
    total = jnp.sum(near, axis=-1, keepdims=True)
    out = _einsum("bhgm,bhmv->bhgv", near.astype(c.dtype), state["v"])
    if far is not None:
        far = jnp.exp(far - top)
        total += jnp.sum(far, axis=-1, keepdims=True)
        out += _einsum("bhgs,bhsv->bhgv", far.astype(c.dtype), state["mean"].astype(c.dtype))
        state |= {f"leaving_{name}": _read(state[name], next_slot, axis) for name, axis in (("z", -1), ("v", -2))}
    out = (out / total).astype(c.dtype).reshape(n_rows, -1)
    if c.head_type == "shga":
        out *= gate
    return state, _einsum("bn,nd->bd", out, weights["w_o"].reshape(-1, c.d_model)).astype(c.dtype)


def _cache_with_leaving(state: dict, docs: _Documents, shape: tuple[int, int]) -> dict:
    """The cache's mean and count, including the token that left the ring last; see the rule for documents in cache.py.
    Where the document changes only counts are reset: a mean with a count of 0 is never used. shape: B and H."""

    def per_head(flag):  # bool [B]
        return _lean(jnp.broadcast_to(flag[:, None], shape))[..., None]

    place = _place(state["leaving_z"])
    count = jnp.where(per_head(docs.keeps_cache), state["count"], 0.0)
    before, mean = count[place][..., None], state["mean"].at[place].get(mode="promise_in_bounds")
    value = state["leaving_v"].astype(jnp.float32)
    mixed = jnp.where(before > 0, mean + (value - mean) / (before + 1.0), value)
    mixed = jnp.where(per_head(docs.leaves), mixed, mean)
    is_code = state["leaving_z"][..., None] == as_last_axes(jnp.arange(count.shape[-1]), count)
    return dict(
        mean=state["mean"].at[place].set(mixed, mode="promise_in_bounds", unique_indices=True),
        count=count + jnp.where(per_head(docs.leaves) & is_code, 1.0, 0.0),
    )


def _mlp(weights: dict, x: jax.Array, c: TransformerConfig) -> jax.Array:
    hidden = _einsum("bd,nd->bn", _norm(weights["norm"], x, c), weights["w_up"]).astype(c.dtype)
    return _einsum("bn,nd->bd", nn.gelu(hidden), weights["w_down"]).astype(c.dtype)


def _norm(params: dict | None, x: jax.Array, c: TransformerConfig) -> jax.Array:
    return cast(jax.Array, RMSNorm(c, use_scale=params is not None).apply({"params": params or {}}, x))


def _write(ring: jax.Array, x: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    """Writes x into a ring. slot: a scalar, or one for each element of the axes before `axis`."""
    if not slot.ndim:
        return jax.lax.dynamic_update_index_in_dim(ring, x.astype(ring.dtype), slot, axis)
    return ring.at[_place(slot)].set(x.astype(ring.dtype), mode="promise_in_bounds", unique_indices=True)


def _read(ring: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    if not slot.ndim:
        return jax.lax.dynamic_index_in_dim(ring, slot, axis, keepdims=False)
    return ring.at[_place(slot)].get(mode="promise_in_bounds")


def _place(index: jax.Array) -> tuple:
    """The indices that select `index` [...] on the axis after its own."""
    return *jnp.ogrid[tuple(slice(n) for n in index.shape)], index


def _einsum(product: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """jnp.einsum in float32. Axes of x with size 1 are dropped, in y too, which may lack them already: XLA:CPU
    multiplies a matrix by a vector two to three times as fast as by a matrix with one row."""
    of_x, of_y, of_out = product.replace("->", ",").split(",")
    single = {name for name, size in zip(of_x, x.shape, strict=True) if size == 1}
    if y.ndim == len(of_y):
        y = y.reshape([size for name, size in zip(of_y, y.shape, strict=True) if name not in single])
    x = x.reshape([size for name, size in zip(of_x, x.shape, strict=True) if name not in single])
    of_x, of_y, of_lean = ("".join(name for name in names if name not in single) for names in (of_x, of_y, of_out))
    out = jnp.einsum(f"{of_x},{of_y}->{of_lean}", x, y, preferred_element_type=jnp.float32)
    return jnp.expand_dims(out, [place for place, name in enumerate(of_out) if name in single])
