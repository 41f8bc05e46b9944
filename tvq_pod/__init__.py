"""Trains Transformer-VQ language models: dense attention in linear time, over documents of any length."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # jax is imported only by code that needs it
    from tvq_pod.inference.loaded import LoadedModel

__version__ = "0.2.0"  # pyproject.toml reads it from here


def load(workdir: str | os.PathLike[str], step: int | None = None) -> "LoadedModel":
    """Loads a checkpoint of the run in `workdir`, a local folder or gs://, onto this process's devices.

    step: the checkpoint's step; None: the newest. Returns its model, parameters and vocabulary, with methods that score
    and generate text. Raises tvq_pod.errors.UserError if there is no such checkpoint, or it is damaged. docs/export.md
    has an example.
    """
    from tvq_pod.inference.loaded import load_run

    return load_run(workdir, step)
