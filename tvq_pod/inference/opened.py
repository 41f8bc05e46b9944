"""A run's checkpoint, found and checked, and its model on all devices, for modes that evaluate a text model."""

import dataclasses
import functools

from etils import epath

from tvq_pod.config.identity import model_record
from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.data.open import run_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.terminal import say
from tvq_pod.inference import images
from tvq_pod.inference.batched import BatchedModel
from tvq_pod.parallel.attention import attention_line, with_tried_attention
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.training.step import abstract_train_state


class OpenedRun:
    """An opened run. Attributes: step, the checkpoint's; checkpoints, which must be closed; vocab; weights, ema or
    raw."""

    def __init__(self, settings: Settings, workdir: epath.Path, step: int | None, what: str):
        """what: the flag that needs text, for example --mode=lm_eval. Raises UserError for an image model, and for a
        checkpoint that does not exist or does not belong to the settings' model."""
        if images.are_images(settings):
            raise UserError(f"config.data.format=imagenet64: {what} is for text models")
        self._settings = settings
        self.checkpoints = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
        self.step = self.checkpoints.pick(step)
        self.vocab = run_vocab(settings, workdir)
        self.checkpoints.check(self.step, model_record(settings, self.vocab.name))
        check_vocab_fits(settings, self.vocab.n_vocab)
        self.weights = self.checkpoints.weights(self.step, settings.eval.weights)

    @functools.cached_property
    def model(self) -> BatchedModel:
        """The model, with rows spread over all devices of the job."""
        given = self._settings.mesh
        mesh = make_mesh(slim := MeshSettings(slices=given.slices, fsdp=given.fsdp))
        settings = with_tried_attention(dataclasses.replace(self._settings, mesh=slim), mesh)
        say(attention_line(settings.model, mesh))
        abstract = abstract_train_state(settings, mesh).params
        params = self.checkpoints.restore_params(self.step, abstract, self.weights)
        return BatchedModel(settings, params, self.vocab, mesh, shows_progress=True)
