"""The z-loss of PaLM (arXiv 2204.02311, section 5): the training loss has it, and the reported loss does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import model_params, small_config
from tvq_pod.config.settings import Settings, TrainSettings
from tvq_pod.nn.model import Transformer, token_losses
from tvq_pod.nn.types import VQSpec
from tvq_pod.training.step import make_gradients

WEIGHT, ROWS, LENGTH = 0.3, 4, 8
# A vocabulary that is narrower than the model, whose logits are held at once, and one whose losses go block by block.
NARROW = small_config(n_layer=1, n_vocab=7, head_type="mqa", e_norm=False, is_train=True)
WIDE = NARROW.replace(n_vocab=11)
assert NARROW.n_vocab <= NARROW.d_model < WIDE.n_vocab


@functools.cache
def batch_of(n_vocab: int) -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, n_vocab, size=[2, ROWS, LENGTH]).astype(np.int32)
    mask = (rng.uniform(size=[ROWS, LENGTH]) < 0.7).astype(np.float32)
    return dict(inputs=tokens[0], targets=tokens[1], doc_ids=np.zeros([ROWS, LENGTH], np.int32), loss_mask=mask)


@functools.cache
def found(config, z_loss: float, microbatches: int = 1):
    """Gradients and metrics of the training loss."""
    train = TrainSettings(batch_size=ROWS, update_len=LENGTH, microbatches=microbatches, z_loss=z_loss)
    gradients = jax.jit(make_gradients(Settings(model=config, train=train)))
    state = Transformer.initial_state(config, ROWS)
    grads, _, metrics = gradients(model_params(config), state, batch_of(config.n_vocab), jax.random.key(0))
    return grads, metrics


def mean_of_log_z_squared(config, params: dict) -> jax.Array:
    """From the logits, over the positions that count, written out."""
    batch, state = batch_of(config.n_vocab), Transformer.initial_state(config, ROWS)
    spec = VQSpec(batch["loss_mask"])
    _, out = Transformer(config).apply({"params": params}, state, batch["inputs"], batch["doc_ids"], spec)
    z = jnp.sum(jnp.exp(out["logits"]), axis=-1)
    return jnp.sum(batch["loss_mask"] * jnp.log(z) ** 2) / jnp.sum(batch["loss_mask"])


@pytest.mark.parametrize("config", [NARROW, WIDE], ids=["narrow", "wide"])
def test_z_is_the_sum_of_exp_of_the_logits_of_each_token(config):
    rng = np.random.default_rng(0)
    x, output = rng.normal(size=[2, ROWS, 4, config.d_model]), rng.normal(size=[config.d_model, config.n_vocab])
    targets = rng.integers(0, config.n_vocab, size=[2, ROWS, 4])
    losses = jax.jit(token_losses, static_argnums=(3, 4))
    given = jnp.float32(x), jnp.float32(output), targets, 0.5
    assert set(losses(*given, False)) == {"losses"}
    found = losses(*given, True)
    logits = 0.5 * x @ output
    log_z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(found["log_z"], log_z, rtol=1e-4, atol=1e-5)
    of_target = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["losses"], log_z - of_target, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [NARROW, WIDE], ids=["narrow", "wide"])
def test_its_gradient_is_added_and_the_reported_loss_is_without_it(config):
    (plain, metrics), (grads, with_z) = found(config, 0.0), found(config, WEIGHT)
    expected, slope = jax.jit(jax.value_and_grad(functools.partial(mean_of_log_z_squared, config)))(
        model_params(config)
    )
    assert "z_loss" not in metrics
    assert expected > 0.1
    np.testing.assert_allclose(with_z["z_loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(with_z["loss"], metrics["loss"], rtol=1e-6)
    moved = jax.tree.map(lambda with_it, without: with_it - without, grads, plain)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, WEIGHT * b, rtol=1e-3, atol=1e-4), moved, slope)


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch():
    whole, parts = found(WIDE, WEIGHT), found(WIDE, WEIGHT, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, parts)
