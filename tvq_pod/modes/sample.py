"""--mode=sample: text or images from a checkpoint."""

import dataclasses
import json

import jax
from etils import epath

from tvq_pod.config.identity import model_record
from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.data.open import run_vocab
from tvq_pod.inference import images
from tvq_pod.inference.text import continuations
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.processes import on_process_zero, text_from_process_zero
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.training.step import abstract_train_state


def sample(settings: Settings, workdir: epath.Path, prompts: list[bytes], step: int | None) -> None:
    """Continues each prompt (or config.sample.prompt) with a checkpoint of the run in `workdir`, on stdout,
    config.sample.count times; for a model of images, draws so many.

    Rows are spread over all devices, of all processes; process 0's prompts are taken. One process shows the first row's
    text as it comes, several when all rows have ended.
    """
    images.check_packages(settings)
    checkpoints = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
    step = checkpoints.pick(step)
    vocab = run_vocab(settings, workdir)
    checkpoints.check(step, model_record(settings, vocab.name))
    check_vocab_fits(settings, vocab.n_vocab)
    alone, count = jax.process_count() == 1, settings.sample.count
    prompts = _from_process_zero(prompts or [settings.sample.prompt.encode()])
    given = [prompt for prompt in prompts for _ in range(count)]
    n_rows = count if images.are_images(settings) else len(given)
    settings = dataclasses.replace(settings, mesh=MeshSettings(slices=1 if alone else settings.mesh.slices))
    mesh = make_mesh(settings.mesh, jax.local_devices()[:n_rows] if alone else None)
    abstract = abstract_train_state(settings, mesh).params
    params = checkpoints.restore_params(step, abstract, settings.eval.weights)
    devices = list(mesh.devices.flat)
    if images.are_images(settings):
        drawn = images.draw_images(params, settings.model, settings.sample, devices)
        on_process_zero(lambda: images.write_samples(drawn, workdir, step))
    else:
        texts = continuations(params, settings.model, vocab, settings.sample, given, devices)
        if not alone:
            texts = [list(pieces) for pieces in texts]
        on_process_zero(lambda: _show(texts))
    checkpoints.close()


def _from_process_zero(prompts: list[bytes]) -> list[bytes]:
    """Process 0's: a prompt's file may differ from host to host."""
    texts = json.loads(text_from_process_zero(json.dumps([prompt.decode("latin-1") for prompt in prompts])))
    return [text.encode("latin-1") for text in texts]


def _show(texts) -> None:
    for index, pieces in enumerate(texts):
        if index:
            print("\n" + "-" * 80)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
