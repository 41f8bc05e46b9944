"""The example of docs/library.md: VQAttention trains inside somebody else's flax model."""

import pathlib
import re

import jax
import numpy as np
import pytest

from tvq_pod.nn.codebook import is_codebook

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "library.md"


@pytest.fixture(scope="module")
def example() -> dict:
    """The names that the page's code leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {"__name__": "example"}
    with jax.numpy_rank_promotion("allow"):  # as a user's program has it
        exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.mark.slow(4)
def test_the_loss_falls(example):
    losses = example["losses"]
    assert losses[0] > 5.0  # nothing is known yet: log(256) is 5.5
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow(3)
def test_states_are_carried_from_update_to_update(example):
    n_tokens = example["STEPS"] * example["UPDATE_LEN"]
    for state in example["states"]:
        np.testing.assert_array_equal(state["pos_offset"], n_tokens)
        in_cache = np.asarray(state["aggcache"]["lower"]).sum(axis=-1)
        np.testing.assert_array_equal(in_cache, n_tokens - example["config"].mem_len)


def test_codebooks_follow_their_average_alone(example):
    """Counts start at 1 a code; so after n steps they sum up to g^n S + (1 - g^n) times the keys of an update."""
    config, model, params = example["config"], example["Model"](), example["params"]
    inputs = (np.zeros([example["ROWS"], example["UPDATE_LEN"]], np.int32),) * 3
    start = jax.jit(model.init)(jax.random.key(0), example["states"], *inputs)["params"]
    start = dict(jax.tree_util.tree_leaves_with_path(jax.tree.map(np.asarray, example["nn"].meta.unbox(start))))
    left = config.c_gamma ** example["STEPS"]
    keys = example["ROWS"] * example["UPDATE_LEN"]
    codebooks = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_codebook(path)]
    assert len(codebooks) == 4
    for path, leaf in codebooks:
        assert np.abs(leaf - start[path]).max() > 0.01, path
        if path[-1].key == "count":
            np.testing.assert_allclose(leaf.sum(), left * config.n_code + (1 - left) * keys, rtol=1e-4)
    moments = jax.tree_util.tree_leaves_with_path(example["opt_state"])
    assert moments
    assert not any(is_codebook(path) for path, _ in moments)
