"""`tvq_pod.load`: the model that it returns says what the model of the checkpoint says."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_pod
from tests.command import ROOT, environment
from tests.common import model_params
from tests.inference.conftest import SETTINGS
from tvq_pod.data.vocab import END_OF_DOC
from tvq_pod.errors import UserError
from tvq_pod.nn.model import Transformer

PAGE = ROOT / "docs/export.md"


def log_probabilities(document):
    """Of the tokens of one document, by the plain model and no other part of the program."""
    config = SETTINGS.model.replace(attention="plain", block_len=1)
    inputs = np.array([END_OF_DOC, *document[:-1]], np.int32)[None]

    @jax.jit
    def apply(params):
        state = Transformer.initial_state(config, 1)
        logits = Transformer(config).apply({"params": params}, state, inputs, jnp.zeros_like(inputs))[1]["logits"]
        return jax.nn.log_softmax(logits[0])

    return np.take_along_axis(np.asarray(apply(model_params(SETTINGS.model))), document[:, None], axis=1)[:, 0]


@pytest.mark.slow(3)
def test_scores_are_log_probabilities_of_each_token_given_all_before(loaded):
    """Of texts of several updates, side by side."""
    texts = ["a short one", "x", "a longer text, of more tokens than an update and a window have together. " * 2]
    scores = loaded.score(texts, with_end=True)
    for text, found in zip(texts, scores, strict=True):
        document = np.array([*loaded.vocab.encode(text.encode()), END_OF_DOC])
        np.testing.assert_allclose(found, log_probabilities(document), atol=1e-4, rtol=0)
    without = loaded.score(texts)
    for text, found, whole in zip(texts, without, scores, strict=True):
        assert len(found) == len(text)
        np.testing.assert_array_equal(found, whole[:-1])


@pytest.mark.slow(2)
def test_texts_are_scored_alike_alone_and_among_many(loaded):
    """More of them than rows."""
    texts = [f"text number {n}" * (n % 3) for n in range(11)]  # empty ones, too
    scores = loaded.score(texts)
    assert [len(found) for found in scores] == [len(text) for text in texts]
    np.testing.assert_allclose(loaded.score([texts[10]])[0], scores[10], atol=1e-5)
    assert loaded.score([]) == []


@pytest.mark.slow(2)
def test_bytes_are_scored_as_they_are(loaded):
    (found,) = loaded.score([b"\xff\x00"])
    np.testing.assert_allclose(found, log_probabilities(np.array([258, 3])), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_generated_tokens_are_the_likeliest_at_temperature_0(loaded):
    prompts = ["ab", "", "a longer prompt"]
    drawn = loaded.generate_tokens(
        [loaded.vocab.encode(prompt.encode()) for prompt in prompts], length=12, temperature=0.0
    )
    apply, state = jax.jit(loaded.model.apply), Transformer.initial_state(loaded.model.config, 1)
    for prompt, new in zip(prompts, drawn, strict=True):
        assert 0 < len(new) <= 12
        inputs = np.zeros([1, 32], np.int32)
        inputs[0, : len(prompt) + len(new)] = [END_OF_DOC, *loaded.vocab.encode(prompt.encode()), *new[:-1]]
        _, out = apply({"params": loaded.params}, state, inputs, np.zeros_like(inputs))
        logits = np.array(out["logits"][0, len(prompt) : len(prompt) + len(new)])
        logits[:, [0, 2, *range(259, 264)]] = -np.inf
        np.testing.assert_array_equal(new, logits.argmax(axis=1))
    texts = loaded.generate(prompts, length=12, temperature=0.0)
    assert texts == [bytes(int(id_) - 3 for id_ in new).decode(errors="replace") for new in drawn]
    assert loaded.generate([]) == []


@pytest.mark.slow
def test_the_likeliest_of_one_token_is_the_likeliest_token(loaded):
    prompts = ["ab", "", "a longer prompt"]
    greedy = loaded.generate(prompts, length=12, temperature=0.0)
    assert loaded.generate(prompts, length=12, top_k=1) == greedy
    assert loaded.generate(prompts, length=12, min_p=0.9999) == greedy
    assert loaded.generate(prompts, length=12, temperature=0.0, repetition_penalty=50.0) != greedy


@pytest.mark.slow
def test_more_prompts_than_fit_side_by_side_have_each_their_own_random_numbers(loaded, monkeypatch):
    prompts = [np.array([70])] * 10
    together = loaded.generate_tokens(prompts, length=6, temperature=1.0, top_p=1.0)
    monkeypatch.setattr("tvq_pod.inference.sampler.Sampler._rows_that_fit", lambda self: 1)
    in_groups = dataclasses.replace(loaded).generate_tokens(prompts, length=6, temperature=1.0, top_p=1.0)
    assert list(map(list, in_groups)) == list(map(list, together))
    assert list(together[8]) != list(together[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loaded: loaded.score("a text"), "texts='a text': is one text; give a list of texts"),
        (lambda loaded: loaded.generate(b"a text"), "texts=b'a text': is one text; give a list of texts"),
        (lambda loaded: loaded.score_tokens([[5, 259]]), "tokens=259: is not a token id; must be an integer from 0 to"),
        (
            lambda loaded: loaded.score_tokens([[5, -1]]),
            "tokens=-1: is not a token id; must be an integer from 0 to 258",
        ),
        (
            lambda loaded: loaded.score_tokens([[5.5]]),
            "tokens=5.5: is not a token id; must be an integer from 0 to 258",
        ),
        (lambda loaded: loaded.generate_tokens([[5], [259]]), "tokens=259: is not a token id"),
        (lambda loaded: loaded.generate(["a"], temperature=-1.0), "temperature=-1.0: must be at least 0"),
        (lambda loaded: loaded.generate(["a"], temperature=math.nan), "temperature=nan: must be at least 0"),
        (lambda loaded: loaded.generate(["a"], top_p=0.0), "top_p=0.0: must be above 0 and at most 1"),
        (lambda loaded: loaded.generate(["a"], top_k=-1), "top_k=-1: must be at least 0"),
        (lambda loaded: loaded.generate(["a"], min_p=1.0), "min_p=1.0: must be below 1 and at least 0"),
        (lambda loaded: loaded.generate(["a"], repetition_penalty=0.0), "repetition_penalty=0.0: must be above 0"),
        (lambda loaded: loaded.generate(["a"], length=-1), "length=-1: must be at least 0"),
        (lambda loaded: loaded.generate(["a"], seed=2**31), "seed=2147483648: must be below 2 ** 31"),
    ],
)
def test_what_can_not_be_scored_or_drawn_is_one_line(loaded, call, message):
    with pytest.raises(UserError) as raised:
        call(loaded)
    assert str(raised.value).startswith(message)


def test_a_checkpoint_that_is_not_there_is_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match="--step=7: "):
        tvq_pod.load(workdir, step=7)
    with pytest.raises(UserError, match=r"has no config\.json"):
        tvq_pod.load(tmp_path)
    shutil.copy(workdir / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint"):
        tvq_pod.load(str(tmp_path))


def test_importing_tvq_pod_imports_no_more_than_python_has():
    code = "import sys; before = set(sys.modules); import tvq_pod; tvq_pod.load; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names) == {"tvq_pod"}


@pytest.mark.slow
def test_the_example_of_the_page_runs(workdir, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(workdir.parent)
    names = {"__name__": "example"}
    with jax.numpy_rank_promotion("allow"):  # as a user's program has it
        exec(compile(code, str(PAGE), "exec"), names)
    texts, bits = names["texts"], names["bits_per_byte"]
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
    assert len(bits) == 2
    assert all(4 < value < 12 for value in bits)  # of parameters that know nothing
    assert names["logits"].shape == (1, 16, 264)
