"""Samples of a model of images: 12,288 bytes each, pixel by pixel, as PNG files and a contact sheet of all."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tvq_pod.config import IMAGE_SHAPE, SampleSettings, Settings
from tvq_pod.data.vocab import END_OF_DOC, N_SPECIAL
from tvq_pod.draw import draw_token
from tvq_pod.errors import UserError
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.scores import NEVER
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.deadlines import still_working
from tvq_pod.progress import say

GAP = 2  # pixels between images of a sheet


def are_images(settings: Settings) -> bool:
    """Whether documents are images."""
    return settings.data.format == "imagenet64"


def check_packages(settings: Settings) -> None:
    """Raises UserError if images are to be drawn and can't be written."""
    if are_images(settings) and settings.sample.length and not importlib.util.find_spec("PIL"):
        raise UserError("config.data.format=imagenet64: samples as PNG need pip install -e '.[data]'")


def draw_images(params: dict, config: TransformerConfig, settings: SampleSettings) -> np.ndarray:
    """`settings.count` images, uint8 [count, 64, 64, 3], all at once, each from an empty document."""
    config, count = config.replace(is_train=False, block_len=1), settings.count
    ids = np.arange(config.n_vocab)
    is_byte = (ids >= N_SPECIAL) & (ids < N_SPECIAL + 256)
    draw = functools.partial(draw_token, temperature=settings.temperature, nucleus_p=settings.nucleus_p)

    @functools.partial(jax.jit, donate_argnums=1)
    def row(params, state, tokens, key):
        """A row of pixels: (state, tokens [count]) -> (state, tokens, bytes [192, count])."""

        def step(carry, index):
            state, tokens = carry
            state, out = Transformer(config).apply(
                {"params": params}, state, tokens[:, None], jnp.zeros([count, 1], jnp.int32)
            )
            logits = jnp.where(is_byte, out["logits"][:, 0], NEVER)
            keys = jax.random.split(jax.random.fold_in(key, index), count)
            tokens = jax.vmap(draw)(logits, keys)
            return (state, tokens), (tokens - N_SPECIAL).astype(jnp.uint8)

        (state, tokens), drawn = jax.lax.scan(step, (state, tokens), jnp.arange(IMAGE_SHAPE[1] * IMAGE_SHAPE[2]))
        return state, tokens, drawn

    state = jax.jit(Transformer.initial_state, static_argnums=(0, 1))(config, count)
    tokens = jnp.full([count], END_OF_DOC, jnp.int32)
    rows = []
    for index in range(IMAGE_SHAPE[0]):
        key = jax.random.fold_in(jax.random.key(settings.seed), index)
        state, tokens, drawn = row(params, state, tokens, key)
        rows.append(np.asarray(drawn))
        still_working()
    return np.concatenate(rows).T.reshape(count, *IMAGE_SHAPE)


def sheet(images: np.ndarray) -> np.ndarray:
    """Images [n, height, width, 3] side by side, as near to a square as can be: uint8 [height, width, 3]."""
    n, height, width, _ = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    whole = np.full([-(-n // columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3], 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        whole[top : top + height, left : left + width] = image
    return whole


def write_samples(settings: Settings, workdir: epath.Path, params: dict, step: int) -> None:
    """Draws images, and keeps them as WORKDIR/samples/step_STEP_NUMBER.png and, together, step_STEP.png."""
    from PIL import Image

    images = draw_images(params, settings.model, settings.sample)
    folder = workdir / "samples"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in [(f"step_{step}.png", sheet(images))] + [
            (f"step_{step}_{number}.png", image) for number, image in enumerate(images)
        ]:
            with (folder / name).open("wb") as file:
                Image.fromarray(image).save(file, "png")
    except OSError as error:
        say(f"WARNING: {folder} can't be written ({error.strerror}): the images are lost")
        return
    say(f"{len(images)} images: {folder / f'step_{step}.png'} has all")
