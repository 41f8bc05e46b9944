"""Samples of an image model: 12,288 bytes each, pixel by pixel, as PNG files and a contact sheet."""

import numpy as np
from etils import epath

from tvq_pod.config.settings import IMAGE_SHAPE, SampleSettings, Settings
from tvq_pod.data.vocab import N_SPECIAL
from tvq_pod.host.extras import require
from tvq_pod.host.terminal import say
from tvq_pod.inference.sampler import Sampler, Sampling
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.deadlines import still_working

GAP = 2  # pixels between the images of a sheet


def are_images(settings: Settings) -> bool:
    """Whether documents are images."""
    return settings.data.format == "imagenet64"


def check_packages(settings: Settings) -> None:
    """Raises UserError if samples are images and the package that writes them is missing."""
    if are_images(settings) and settings.sample.length:
        require("PIL", "config.data.format=imagenet64: writing samples as PNG")


def draw_images(params: dict, config: TransformerConfig, settings: SampleSettings, devices: list) -> np.ndarray:
    """Draws `settings.count` images side by side, uint8 [count, 64, 64, 3], each from an empty document."""
    ids = np.arange(config.n_vocab)
    is_byte = (ids >= N_SPECIAL) & (ids < N_SPECIAL + 256)
    length = int(np.prod(IMAGE_SHAPE))
    how = (settings.temperature, settings.top_p, settings.top_k, settings.min_p, settings.repetition_penalty)
    sampler = Sampler(config, Sampling(tuple(is_byte.tolist()), *how), settings.count, devices, settings.max_rows)
    rows = []
    for first in range(0, settings.count, sampler.batch_size):
        prompts = [np.zeros([0], np.int32)] * min(sampler.batch_size, settings.count - first)
        chunks = []
        for chunk in sampler.sample(params, prompts, settings.seed, length, first_row=first, stop_at_end=False):
            chunks.append(chunk)
            still_working()
        rows.append(np.concatenate(chunks, axis=1)[:, :length])
    return (np.concatenate(rows) - N_SPECIAL).astype(np.uint8).reshape(-1, *IMAGE_SHAPE)


def sheet(images: np.ndarray) -> np.ndarray:
    """Arranges images [n, height, width, 3] as nearly in a square as possible: uint8 [height, width, 3]."""
    n, height, width, _ = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    whole = np.full([-(-n // columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3], 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        whole[top : top + height, left : left + width] = image
    return whole


def write_samples(images: np.ndarray, workdir: epath.Path, step: int) -> None:
    """Writes images as WORKDIR/samples/step_STEP_NUMBER.png and, together, step_STEP.png."""
    from PIL import Image

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
