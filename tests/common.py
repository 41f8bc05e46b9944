"""What the tests share: small configs, an attention layer with its parameters, random arrays, and slow oracles.

The functions named *_fixture are plain functions; conftest.py offers each as a pytest fixture of the same name too.
"""

import functools
import itertools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.build import make_store
from tvq_pod.data.document import Document
from tvq_pod.data.store import TokenStore
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.nn.attn import VQAttention
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig, VQSpec

DTYPES = [jnp.float32]  # of parameters and of compute alike
FAST = ["xla"]  # implementations of attention with hand-written gradients; the oracle beside them is "plain"
WIDENINGS = [1, 2]  # d_v over d_model


def rng_fixture(seed: int) -> jax.Array:
    """A random key."""
    return jax.random.key(seed)


def gen_len_tuples(order: str, t: int = 12) -> list[tuple[int, ...]]:
    """All combinations of t, block_len and mem_len, the last two over the divisors of t.

    order: which of them, in which order, by the letters t, l and m.
    """
    divisors = [n for n in range(1, t + 1) if t % n == 0]
    values = {"t": [t], "l": divisors, "m": divisors}
    return list(itertools.product(*(values[letter] for letter in order)))


def transformer_config_fixture(
    *, block_len, mem_len, agg_cache, widening, dtypes, is_train, **changes
) -> TransformerConfig:
    """A config small enough to test every combination: two heads, no dropout, the plain implementation of attention.

    dtypes: one dtype, of parameters and of compute. changes: any other field of TransformerConfig.
    """
    d_model = 8
    config = TransformerConfig(
        d_model=d_model,
        d_k=6,
        d_v=d_model * widening,
        n_head=2,
        n_code=5,
        n_layer=2,
        n_vocab=11,
        block_len=block_len,
        mem_len=mem_len,
        agg_cache=agg_cache,
        attention="plain",
        dtype=dtypes,
        param_dtype=dtypes,
        is_train=is_train,
        remat="none",
    )
    return config.replace(**changes)


def small_config(**changes) -> TransformerConfig:
    """`transformer_config_fixture` with defaults for everything, and the implementation of attention that users get."""
    defaults = dict(block_len=4, mem_len=4, agg_cache=True, widening=1, dtypes=DTYPES[0], is_train=False)
    defaults |= dict(attention="auto")
    return transformer_config_fixture(**(defaults | changes))


def rngs_fixture(seed: int = 0) -> dict:
    """Keys for the two kinds of dropout."""
    ephemeral, timeless = jax.random.split(rng_fixture(seed))
    return dict(ephemeral=ephemeral, timeless=timeless)


@functools.cache
def _attn_params(sizes: TransformerConfig) -> dict:
    inputs = dict(
        input_features=jnp.zeros([1, sizes.block_len, sizes.d_model], sizes.dtype),
        doc_ids=jnp.zeros([1, sizes.block_len], jnp.int32),
        vq_spec=None,
    )
    init = jax.jit(VQAttention(sizes).init)
    params = nn.meta.unbox(init(rng_fixture(1), VQAttention.initial_state(sizes, 1), inputs)["params"])
    # A layer starts with u = v = 0; tests want to see them matter.
    keys = jax.random.split(rng_fixture(2), 2)
    return params | {
        name: jax.random.normal(key, params[name].shape, params[name].dtype)
        for name, key in zip("uv", keys, strict=True)
    }


def attn_fixture(config: TransformerConfig) -> tuple[type[VQAttention], dict]:
    """The class VQAttention, and parameters for a layer of `config`.

    Parameters are the same for every block_len, mem_len, cache setting and implementation of attention.
    """
    sizes = config.replace(
        block_len=4, mem_len=4, agg_cache=True, grad_thru_cache=True, attention="plain", is_train=False
    )
    return VQAttention, _attn_params(sizes)


def model_params(config: TransformerConfig) -> dict:
    """Random parameters of a Transformer, all of them at work. Numpy draws them: to compile the model's own way to do
    it takes a second. A parameter is the same in all configs where it has the same shape."""
    defaults, no_part_in_shapes = small_config(), (
        "block_len", "mem_len", "agg_cache", "grad_thru_cache", "is_train", "dtype", "remat", "unroll", "reduction",
        "window_bias", "e_scale", "p_dropemb", "p_dropsin", "p_dropres", "p_droplyr",
    )  # fmt: skip
    return _model_params(config.replace(**{name: getattr(defaults, name) for name in no_part_in_shapes}))


@functools.cache
def _model_params(config: TransformerConfig) -> dict:
    tokens = jnp.zeros([1, config.block_len], jnp.int32)
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    shapes = jax.eval_shape(init, Transformer.initial_state(config, 1), tokens, tokens)["params"]
    deviations = dict(embedding=1.0, codebook=config.d_k**-0.25, u=1.0, v=1.0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "pe_scale", "count"):
            return jnp.ones(leaf.shape, leaf.dtype)
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        array = rng.normal(size=leaf.shape) * deviations.get(name, config.d_model**-0.5)
        return jnp.array(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes))


def basic_vq_spec_fixture(batch_size: int, block_len: int) -> VQSpec:
    """Every position counts."""
    return VQSpec(loss_mask=jnp.ones([batch_size, block_len], jnp.float32))


def random_qkv(config: TransformerConfig, batch_size: int, length: int, seed: int = 0) -> dict:
    """q [B, Q, T, K], k [B, H, T, K] and v [B, H, T, V]."""
    keys = jax.random.split(rng_fixture(seed), 3)
    widths = dict(q=config.d_k, k=config.d_k, v=config.d_v)
    heads = dict(q=config.n_head, k=config.n_key_head, v=config.n_key_head)
    return {
        name: jax.random.normal(key, [batch_size, heads[name], length, widths[name]])
        for (name, key) in zip("qkv", keys, strict=True)
    }


def attend_in_blocks(config: TransformerConfig, params: dict, q, k, v, doc_ids, state=None):
    """The recurrent way, by the contract's methods alone: attention of T / L blocks, the state carried from one to the
    next. Returns (state, attn_out [B, T, Q * V])."""
    cls = VQAttention(config)
    batch_size, length = doc_ids.shape
    state = VQAttention.initial_state(config, batch_size) if state is None else state

    def one_block(state, begin):
        out = cls.apply(
            {"params": params},
            **{
                f"present_{name}": jax.lax.dynamic_slice_in_dim(array, begin, config.block_len, axis)
                for name, array, axis in (("q", q, 2), ("k", k, 2), ("v", v, 2), ("doc_ids", doc_ids, 1))
            },
            state=state,
            vq_spec=basic_vq_spec_fixture(batch_size, config.block_len),
            method=cls.attn,
        )
        recent = {name: array for name, array in out.items() if name.startswith("recent_")}
        state = cls.apply({"params": params}, **recent, state=state, method=cls.update_state)
        return state, out["attn_out"]

    state, outs = jax.lax.scan(one_block, state, jnp.arange(0, length, config.block_len))
    return state, jnp.moveaxis(outs, 0, 1).reshape(batch_size, length, -1)


def sinusoid_table(length: int, width: int) -> np.ndarray:
    """Sines and cosines of distances 0 .. length - 1, written out."""
    half = width // 2
    table = np.zeros([length, width])
    for position in range(length):
        for i in range(half):
            angle = position / 100_000.0 ** (i / max(half - 1, 1))
            table[position, i], table[position, half + i] = np.sin(angle), np.cos(angle)
    return table


def quadratic_attention(config: TransformerConfig, params: dict, q, k, v, doc_ids) -> np.ndarray:
    """The slow, obvious version, in float64: a softmax over all quantized keys of the same document at or before each
    query. No blocks, no window, no cache. Returns [B, T, Q * V]."""
    q, k, v, doc_ids = (np.asarray(x) for x in (q, k, v, doc_ids))
    codebook = np.asarray(params["quantizer"]["codebook"], np.float64)
    u, pos_v = np.asarray(params["u"], np.float64), np.asarray(params["v"], np.float64)
    kernel = np.asarray(params["w_r"]["kernel"], np.float64)  # [H, K, D]
    table = sinusoid_table(config.mem_len + 1, config.d_model)
    r = np.einsum("md,hkd->hmk", table, kernel) * config.d_k**-0.25
    batch_size, n_head, length, _ = q.shape
    out = np.zeros([batch_size, length, n_head, v.shape[-1]])
    per_key_head = n_head // k.shape[1]
    for b, query_head, i in itertools.product(range(batch_size), range(n_head), range(length)):
        h, scores, values = query_head // per_key_head, [], []
        for j in range(i + 1):
            if doc_ids[b, i] != doc_ids[b, j] or (i - j > config.mem_len and not config.agg_cache):
                continue
            code = codebook[h, np.argmin(np.sum((k[b, h, j] - codebook[h]) ** 2, axis=-1))]
            score = (q[b, query_head, i] + u[query_head]) @ code
            if i - j <= config.mem_len:
                score += (q[b, query_head, i] + pos_v[query_head]) @ r[h, i - j] + config.window_bias
            scores.append(score)
            values.append(v[b, h, j])
        weights = np.exp(np.array(scores) - np.max(scores))
        out[b, i, query_head] = weights @ np.array(values) / weights.sum()
    return out.reshape(batch_size, length, -1)


def store_of(path, texts, vocab=None, **settings) -> TokenStore:
    """A store of texts, all for training unless settings (of config.data) say otherwise."""
    data = DataSettings(**(dict(validation_share=0.0, test_share=0.0, source="stdlib") | settings))
    corpus = [Document(str(index), text) for index, text in enumerate(texts)]
    return make_store(path, lambda: iter(corpus), vocab or ByteVocab(), data)


def pg19_like(rng: np.random.Generator, n_books: int) -> np.ndarray:
    """Where books about as long as those of PG-19 begin, and the last ends: log-normal, 87,000 tokens in the mean."""
    return np.concatenate([[0], np.cumsum(np.exp(rng.normal(11.1, 0.75, n_books)).astype(int) + 1000)])
