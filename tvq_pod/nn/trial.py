"""Whether the kernels compute on this device what XLA computes: asked before a run relies on them."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from tvq_pod.nn.attn import VQAttention
from tvq_pod.nn.types import TransformerConfig

TOLERANCE = 0.1  # of bfloat16 both ways, and of a few keys that lie between two codes, errors are about 0.01


def largest_error(config: TransformerConfig) -> float:
    """Of attention by kernels against attention by XLA, on this process's first device: an update of two blocks of one
    row with two documents, a layer's output and all gradients of its parameters and input. Each error is the norm of
    the difference, relative to XLA's norm; NaN if there is one.

    Raises whatever the compiler raises on kernels that it does not take.
    """
    c = config.replace(is_train=False)
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=(2, 1, c.block_len, c.d_model)), c.dtype) for _ in range(2))
    doc_ids = jnp.asarray(np.arange(2 * c.block_len) > 1.25 * c.block_len, jnp.int32).reshape(2, 1, c.block_len)
    state = VQAttention.initial_state(c, 1)

    def results(attention: str, params):
        module = VQAttention(c.replace(attention=attention))

        def loss(params, x):
            applied = module.apply(dict(params=params), state, x, doc_ids, None, method=VQAttention.blocks)
            _, out = cast(tuple[dict, dict], applied)
            return jnp.sum((out["res"] * weights).astype(jnp.float32)), out["res"]

        gradients, res = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
        return jax.tree.map(lambda array: np.asarray(array, np.float64), (res, gradients))

    with jax.default_device(jax.local_devices()[0]):
        inputs = dict(input_features=x[0], doc_ids=doc_ids[0], vq_spec=None)
        init = jax.jit(VQAttention(c.replace(attention="xla")).init)
        params = jax.tree.map(lambda array: array, init(jax.random.key(0), state, inputs)["params"])
        expected, found = (jax.tree.leaves(results(attention, params)) for attention in ("xla", "pallas"))
    errors = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in zip(found, expected, strict=True)]
    return float(np.max(errors))
