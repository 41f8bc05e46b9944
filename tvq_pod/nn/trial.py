"""A check that the kernels compute the same as XLA on this device, before a run relies on them.

A model with two layers of the run's shape reads two updates of four blocks: so caches, states and stacks of layers are
exercised, forward and backward. Neither implementation is exact in bfloat16, and a key between two codes may take
either. So both are compared with float32, and the kernels may be twice as far from it as XLA.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig, VQSpec

TOLERANCE = 0.03  # additional difference allowed between errors
N_ROWS, N_BLOCKS = 2, 4


def largest_excess(config: TransformerConfig) -> float:
    """The largest error of the kernels on this process's first device, minus twice that of XLA, over a loss, all
    gradients of parameters, and the floats of the state. An error is the norm of the difference from float32, relative
    to the float32 norm. NaN if the kernels produce one.

    Raises whatever the compiler raises for kernels that it does not accept.
    """
    c = config.replace(n_layer=2, unroll=1, n_vocab=64, is_train=False, attention="xla")
    rng, shape = np.random.default_rng(0), (2, N_ROWS, N_BLOCKS * c.block_len)  # updates first
    tokens = rng.integers(4, c.n_vocab, shape).astype(np.int32)
    place = np.arange(2 * shape[2]).reshape(2, 1, -1)  # the second row has two documents
    doc_ids = np.concatenate([np.zeros_like(place), place > 1.3 * shape[2]], axis=1).astype(np.int32)
    with jax.default_device(jax.local_devices()[0]):
        state = Transformer.initial_state(c, N_ROWS)
        init = jax.jit(Transformer(c).init)
        boxed = init(jax.random.key(0), Transformer.initial_state(c, 1), tokens[0, :1], doc_ids[0, :1])["params"]
        params = nn.meta.unbox(boxed)
        exact = _results(c.replace(dtype="float32"), params, state, tokens, doc_ids)
        by_xla = _results(c, params, state, tokens, doc_ids)
        by_kernels = _results(c.replace(attention="pallas"), params, state, tokens, doc_ids)

    def error(found, expected):
        return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)

    excess = [error(b, e) - 2.0 * error(a, e) for a, b, e in zip(by_xla, by_kernels, exact, strict=True)]
    return float(np.max(excess))


def _results(config: TransformerConfig, params, state, tokens, doc_ids) -> list[np.ndarray]:
    """The results of the second update."""
    model, spec = Transformer(config), VQSpec(jnp.ones(tokens.shape[1:]))

    def loss(params, state, tokens, doc_ids):
        applied = model.apply(dict(params=params), state, tokens, doc_ids, spec, jnp.roll(tokens, -1, axis=1))
        state, out = cast(tuple[dict, dict], applied)
        return jnp.mean(out["losses"]), state

    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    state = jax.tree.map(lambda x: x.astype(config.dtype) if x.dtype == jnp.bfloat16 else x, state)
    (_, state), _ = gradients(params, state, tokens[0], doc_ids[0])
    (value, state), of_params = gradients(params, state, tokens[1], doc_ids[1])
    leaves = jax.tree.leaves((value, state, of_params))
    return [np.asarray(leaf, np.float64) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
