"""Samples of images: drawn pixel by pixel as the model says, and written so that they can be looked at."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.common import model_params, small_config
from tvq_pod.config.settings import DataSettings, SampleSettings, Settings
from tvq_pod.data.vocab import END_OF_DOC, N_SPECIAL, ByteVocab
from tvq_pod.errors import UserError
from tvq_pod.inference import images
from tvq_pod.nn.model import Transformer

CONFIG = small_config(n_vocab=ByteVocab.n_vocab + 5, block_len=8, mem_len=4, pe_abs=True, n_layer=1)


@pytest.mark.slow
def test_greedy_images_are_the_likeliest_bytes_one_after_the_other(monkeypatch):
    monkeypatch.setattr(images, "IMAGE_SHAPE", (2, 4, 3))
    drawn = images.draw_images(
        model_params(CONFIG), CONFIG, SampleSettings(temperature=0.0, count=2), jax.devices()[:1]
    )
    assert drawn.shape == (2, 2, 4, 3)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    bytes_ = drawn[0].reshape(-1).astype(int) + N_SPECIAL
    inputs = np.concatenate([[END_OF_DOC], bytes_[:-1]])[None].astype(np.int32)

    @jax.jit
    def logits_of(params):
        state = Transformer.initial_state(CONFIG, 1)
        return Transformer(CONFIG).apply({"params": params}, state, inputs, np.zeros_like(inputs))[1]["logits"][0]

    allowed = np.asarray(logits_of(model_params(CONFIG)))[:, N_SPECIAL : N_SPECIAL + 256]
    np.testing.assert_array_equal(bytes_ - N_SPECIAL, allowed.argmax(axis=1))


@pytest.mark.slow
def test_any_byte_may_be_drawn_and_nothing_else(monkeypatch):
    monkeypatch.setattr(images, "IMAGE_SHAPE", (8, 8, 3))
    flat = jax.tree.map(jnp.zeros_like, model_params(CONFIG))  # all tokens equally likely
    drawn = images.draw_images(flat, CONFIG, SampleSettings(count=16, top_p=1.0), jax.devices())
    counts = np.bincount(drawn.reshape(-1), minlength=256)
    assert counts.min() >= 1  # of 12 in the mean
    assert counts.max() < 40


@pytest.mark.slow
def test_images_are_written_one_by_one_and_together(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "IMAGE_SHAPE", (2, 4, 3))
    expected = images.draw_images(model_params(CONFIG), CONFIG, SampleSettings(count=3, seed=1), jax.devices()[:1])
    images.write_samples(expected, epath.Path(tmp_path), step=7)
    names = ["step_7.png", "step_7_0.png", "step_7_1.png", "step_7_2.png"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    assert len(np.unique(expected, axis=0)) == 3
    for number, image in enumerate(expected):
        np.testing.assert_array_equal(Image.open(tmp_path / f"samples/step_7_{number}.png"), image)
    whole = np.asarray(Image.open(tmp_path / "samples/step_7.png"))
    assert whole.shape == (2 * 2 + 2, 2 * 4 + 2, 3)
    np.testing.assert_array_equal(whole[:2, 6:], expected[1])
    np.testing.assert_array_equal(whole[4:, :4], expected[2])
    assert (whole[4:, 6:] == 255).all()


def test_a_folder_that_can_not_be_written_loses_the_images_only(tmp_path, capsys):
    (tmp_path / "samples").write_text("in the way")
    images.write_samples(np.zeros([1, 1, 2, 3], np.uint8), epath.Path(tmp_path), step=7)
    assert "can't be written" in capsys.readouterr().err


def test_pillow_is_asked_for_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = Settings(data=DataSettings(format="imagenet64"))
    with pytest.raises(UserError, match=r"writing samples as PNG needs pip install -e '\.\[data\]'"):
        images.check_packages(settings)
    images.check_packages(dataclasses.replace(settings, sample=SampleSettings(length=0)))
    images.check_packages(Settings())
