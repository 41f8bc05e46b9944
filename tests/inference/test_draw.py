"""top_k, min_p and the repetition penalty, against slow and obvious versions in NumPy."""

import jax
import numpy as np
import pytest

from tvq_pod.inference.draw import draw_tokens, penalized
from tvq_pod.nn.scores import NEVER

N_VOCAB, N_ROWS = 40, 500
draw_compiled = jax.jit(draw_tokens, static_argnames=("temperature", "top_p", "top_k", "min_p"))


def kept_weights(logits, temperature, top_p, top_k, min_p):
    """What each token's weight is after all filters, float64 [n_vocab]: one filter after the other, with sorts."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
    shares, kept = weights[order] / weights[order].sum(), []
    for token, share_before in zip(order, np.cumsum(shares) - shares, strict=True):
        if share_before < top_p and weights[token] >= min_p * weights[order[0]]:
            kept.append(token)
    return np.where(np.isin(np.arange(len(weights)), kept), weights, 0.0)


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=1.0, top_p=1.0, top_k=3, min_p=0.0),
        dict(temperature=0.7, top_p=1.0, top_k=0, min_p=0.2),
        dict(temperature=1.5, top_p=0.6, top_k=7, min_p=0.1),
        dict(temperature=1.0, top_p=0.999, top_k=1, min_p=0.0),
    ],
)
def test_a_token_is_that_whose_share_of_what_is_kept_holds_the_random_number(how):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=[N_ROWS, N_VOCAB]).astype(np.float32)
    logits[:, :5] = NEVER
    uniforms = rng.random(N_ROWS, np.float32)
    drawn, compared, tokens = np.asarray(draw_compiled(logits, uniforms, **how)), 0, set()
    for row in range(N_ROWS):
        weights = kept_weights(logits[row], **how)
        sums = np.cumsum(weights) / weights.sum()
        if np.min(np.abs(sums - uniforms[row])) > 1e-5:  # else rounding decides
            expected = int(np.argmax(sums > uniforms[row]))
            assert drawn[row] == expected
            tokens.add(int(np.count_nonzero(weights)))
            compared += 1
    assert compared > 0.95 * N_ROWS
    assert max(tokens) == how["top_k"] or how["top_k"] in (0, 7)
    assert max(tokens) < 20


def test_top_k_of_all_or_more_keeps_all():
    logits, uniforms = np.zeros([300, 8], np.float32), np.linspace(0, 0.999, 300, dtype=np.float32)
    for top_k in (0, 8, 9):
        drawn = draw_compiled(logits, uniforms, temperature=1.0, top_p=1.0, top_k=top_k)
        assert set(np.asarray(drawn).tolist()) == set(range(8))


def test_a_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    logits = np.array([[2.0, -2.0, 0.0, 3.0, -3.0]], np.float32)
    seen = np.array([[True, True, True, False, False]])
    expected = []
    for logit, is_seen in zip(logits[0], seen[0], strict=True):
        expected.append(logit if not is_seen else logit / 4 if logit > 0 else logit * 4)
    np.testing.assert_allclose(penalized(logits, seen, 4.0)[0], expected)
    np.testing.assert_array_equal(expected, [0.5, -8.0, 0.0, 3.0, -3.0])
