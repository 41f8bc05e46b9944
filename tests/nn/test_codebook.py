"""The codebooks' moving average as an optax transformation: it moves codes exactly, and the weights' optimizer never
sees them."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvq_pod.nn.codebook import (
    CODEBOOK,
    MIN_COUNT,
    WEIGHTS,
    codebook_average,
    ema_update,
    is_codebook,
    n_revived,
    optimizer_labels,
    revive,
)

GAMMA = 0.9


def quantizer(rng, *lead) -> dict:
    codebook, count = rng.normal(size=[*lead, 5, 3]), rng.uniform(0.5, 3.0, size=[*lead, 5])
    return dict(codebook=codebook.astype(np.float32), count=count.astype(np.float32))


def params_and_sums(seed=0) -> tuple[dict, dict]:
    """Parameters with a quantizer alone and one of two stacked layers; sums in which codes 1 and 3 were not chosen, and
    code 4 was chosen very often."""
    rng = np.random.default_rng(seed)
    params = dict(
        embedding=rng.normal(size=[4, 3]).astype(np.float32),
        attention=dict(u=rng.normal(size=[2, 3]).astype(np.float32), quantizer=quantizer(rng, 2)),
        layers=dict(unit0=dict(quantizer=quantizer(rng, 2, 1), kernel=rng.normal(size=[2, 3, 3]).astype(np.float32))),
    )
    n = np.array([2, 0, 1, 0, 1000], np.float32)

    def gradient(path, leaf):
        if not is_codebook(path):
            return rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "count":
            return np.broadcast_to(n, leaf.shape)
        return (rng.normal(size=leaf.shape) * n[:, None]).astype(np.float32)

    return params, jax.tree_util.tree_map_with_path(gradient, params)


def moved(weights: optax.GradientTransformation, params: dict, gradients: dict, n_steps: int = 1) -> dict:
    """The parameters after some steps of the combined optimizer, which all have the same gradients."""
    optimizer = optax.multi_transform({WEIGHTS: weights, CODEBOOK: codebook_average(GAMMA)}, optimizer_labels)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return cast(dict, optax.apply_updates(params, updates)), state

    state = optimizer.init(params)
    for _ in range(n_steps):
        params, state = step(params, state)
    return params


def quantizers_of(tree):
    return [tree["attention"]["quantizer"], tree["layers"]["unit0"]["quantizer"]]


def test_apply_updates_moves_codes_by_the_papers_equations():
    params, sums = params_and_sums()
    after = moved(optax.sgd(0.5), params, sums)
    for old, s, new in zip(*map(quantizers_of, (params, sums, after)), strict=True):
        count, n = old["count"].astype(np.float64), s["count"].astype(np.float64)
        expected = GAMMA * count + (1 - GAMMA) * n
        np.testing.assert_allclose(new["count"], expected, rtol=1e-6)
        codebook = (GAMMA * count)[..., None] * old["codebook"] + (1 - GAMMA) * s["codebook"]
        np.testing.assert_allclose(new["codebook"], codebook / expected[..., None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["embedding"], params["embedding"] - 0.5 * sums["embedding"], rtol=1e-6)


def test_codes_that_nothing_chose_keep_their_place_bit_for_bit_and_their_counts_end_at_the_least():
    params, sums = params_and_sums()
    after = moved(optax.sgd(0.5), params, sums, n_steps=300)  # 0.9 ** 300 is far below the least count
    for old, new in zip(*map(quantizers_of, (params, after)), strict=True):
        np.testing.assert_array_equal(new["codebook"][..., [1, 3], :], old["codebook"][..., [1, 3], :])
        np.testing.assert_array_equal(new["count"][..., [1, 3]], np.float32(MIN_COUNT))
        assert (new["codebook"][..., [0, 2, 4], :] != old["codebook"][..., [0, 2, 4], :]).all()


def test_counts_that_at_most_double_or_halve_are_exact():
    """A count and its update add up to the moving average as float32 has it, operation by operation."""
    old, sums = (quantizers_of(tree)[1] for tree in params_and_sums())
    count, n = (tree["count"][..., :4] for tree in (old, sums))
    expected = GAMMA * count + (1.0 - GAMMA) * n
    assert expected.dtype == np.float32
    assert (expected <= 2 * count).all()
    new = np.asarray(cast(dict, optax.apply_updates(old, ema_update(old, sums, GAMMA)))["count"])
    np.testing.assert_array_equal(new[..., :4], expected)


def test_the_step_of_a_code_is_not_rounded_to_the_grid_of_its_place():
    """As new minus old would be: of a step a millionth as large as the place, one part in twenty would be left over."""
    old, sums = (quantizers_of(tree)[1] for tree in params_and_sums())
    step = ema_update(old, sums, gamma=1.0 - 1e-6)["codebook"]
    codebook, count, key_sums, n = (
        tree[name].astype(np.float64) for tree in (old, sums) for name in ("codebook", "count")
    )
    new_count = (1.0 - 1e-6) * count + 1e-6 * n
    np.testing.assert_allclose(step, 1e-6 * (key_sums - n[..., None] * codebook) / new_count[..., None], rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "decay"])
def test_what_is_done_to_weights_sees_no_codebook(name):
    """Clipping's global norm is that of the gradients, however large the sums are; decay shrinks no code."""
    weights = optax.chain(
        optax.clip_by_global_norm(1.0) if name == "clip" else optax.add_decayed_weights(0.1), optax.sgd(0.5)
    )
    params, sums = params_and_sums()

    def scaled(path, leaf):
        return leaf * np.float32(1e6) if is_codebook(path) else leaf

    larger = jax.tree_util.tree_map_with_path(scaled, sums)
    after, after_larger = moved(weights, params, sums), moved(weights, params, larger)
    for path in (("embedding",), ("attention", "u"), ("layers", "unit0", "kernel")):
        ours, others = after, after_larger
        for key in path:
            ours, others = ours[key], others[key]
        np.testing.assert_array_equal(ours, others)
    undecayed = moved(optax.sgd(0.5), params, sums)
    jax.tree.map(np.testing.assert_array_equal, quantizers_of(after), quantizers_of(undecayed))


def test_the_average_has_no_state_and_a_model_without_codes_needs_none():
    params, sums = params_and_sums()
    assert not jax.tree.leaves(codebook_average(GAMMA).init(params))
    plain, gradients = (dict(embedding=tree["embedding"]) for tree in (params, sums))
    after = moved(optax.sgd(0.5), plain, gradients)
    np.testing.assert_allclose(after["embedding"], plain["embedding"] - 0.5 * gradients["embedding"], rtol=1e-6)


def test_use_without_parameters_or_on_weights_is_refused():
    params, sums = params_and_sums()
    average = codebook_average(GAMMA)
    only = dict(quantizer=params["attention"]["quantizer"])
    with pytest.raises(ValueError, match="give them to update"):
        average.update(only, average.init(only))
    with pytest.raises(ValueError, match="was given weights too; combine it"):
        average.update(sums, average.init(params), params)
    updates, _ = average.update(jax.tree.map(jnp.zeros_like, only), average.init(only), only)
    np.testing.assert_array_equal(cast(dict, updates)["quantizer"]["codebook"], 0.0)


def revived_slowly(codebook, count, share):
    """`revive` for one head, [S, K] and [S], one code at a time."""
    codebook, count = codebook.astype(np.float64), count.astype(np.float64)
    n_code, d_k = codebook.shape
    dead = [s for s in np.argsort(count, kind="stable") if count[s] < share * count.mean()]
    spread = [max(d_k**0.5 - code @ code, 0.0) for code in codebook]
    alive = [s for s in range(n_code) if s not in dead]
    costly = sorted(alive, key=lambda s: -count[s] * spread[s])
    new_codebook, new_count = codebook.copy(), count.copy()
    for s, source in zip(dead, costly, strict=False):
        side = codebook[s] - codebook[source]
        new_codebook[s] = codebook[source] + side / np.linalg.norm(side) * (spread[source] / d_k) ** 0.5
        new_count[s] = new_count[source] = count[source] / 2
    return new_codebook, new_count, min(len(dead), len(alive))


@pytest.mark.parametrize("n_dead", [0, 1, 3, 4, 7])
def test_dead_codes_divide_the_keys_of_the_costliest(n_dead):
    """Each is divided once, so of seven dead codes one moves; heads and layers each have their own."""
    rng = np.random.default_rng(n_dead)
    old = dict(codebook=rng.normal(size=[3, 2, 8, 6]).astype(np.float32) * 0.4, count=np.ones([3, 2, 8], np.float32))
    count = rng.uniform(5.0, 20.0, size=[3, 2, 8]).astype(np.float32)
    for layer, head in np.ndindex(3, 2):
        count[layer, head, rng.permutation(8)[:n_dead]] = rng.uniform(0.01, 0.1, size=n_dead)
    step = dict(codebook=rng.normal(size=[3, 2, 8, 6]).astype(np.float32) * 0.01, count=count - 1)
    after = cast(dict, optax.apply_updates(old, revive(old, step, share=0.1)))
    for at in np.ndindex(3, 2):
        codebook, counts, n_moved = revived_slowly(
            *(old[n][at] + step[n][at] for n in ("codebook", "count")), share=0.1
        )
        np.testing.assert_allclose(after["codebook"][at], codebook, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after["count"][at], counts, rtol=1e-5)
        assert n_revived(count, 0.1)[at] == n_moved == min(n_dead, 8 - n_dead)


def test_codes_that_do_not_move_step_as_without_revival_bit_for_bit():
    rng = np.random.default_rng(0)
    old, step = (
        dict(codebook=rng.normal(size=[5, 3]).astype(np.float32), count=count) for count in np.ones([2, 5], np.float32)
    )
    old["count"] = np.array([9.0, 9.0, 0.0, 8.0, 7.0], np.float32)
    after = revive(old, step, share=0.5)
    assert n_revived(old["count"] + step["count"], 0.5) == 1
    same = np.asarray(after["count"] == step["count"])
    assert same.sum() == 3
    assert not same[2]
    np.testing.assert_array_equal(np.asarray(after["codebook"])[np.arange(5) != 2], step["codebook"][np.arange(5) != 2])


def test_with_revival_all_codes_come_into_use():
    """Keys lie in a narrow cone, as those of a new model do: one code is nearest to nearly all of them."""
    rng = np.random.default_rng(1)
    keys = rng.normal(size=[512, 8]) * 0.2 + np.eye(8)[0]
    keys = (keys / np.linalg.norm(keys, axis=-1, keepdims=True) * 8**0.25).astype(np.float32)

    def used_after_updates(share):
        params = dict(
            quantizer=dict(codebook=rng.normal(size=[1, 16, 8]).astype(np.float32), count=np.ones([1, 16], np.float32))
        )
        average = codebook_average(0.9, share)
        for _ in range(60):
            distances = ((keys[:, None] - params["quantizer"]["codebook"][0]) ** 2).sum(axis=-1)
            onehot = np.eye(16, dtype=np.float32)[distances.argmin(axis=1)]
            sums = dict(quantizer=dict(codebook=(onehot.T @ keys)[None], count=onehot.sum(axis=0)[None]))
            updates, _ = average.update(sums, optax.EmptyState(), params)
            params = jax.tree.map(lambda old, step: np.asarray(old + step, np.float32), params, updates)
        return (onehot.sum(axis=0) > 0).sum()

    assert used_after_updates(0.0) < 8
    assert used_after_updates(0.1) == 16
