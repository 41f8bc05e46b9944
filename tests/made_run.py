"""A run's folder without the training: config.json and one checkpoint, whose parameters are those of `model_params`."""

import dataclasses
import pathlib

import jax

from tests.common import small_config
from tests.made_up import first_state
from tvq_pod.config.identity import run_record
from tvq_pod.config.run_config import to_json
from tvq_pod.config.settings import CheckpointSettings, DataSettings, MeshSettings, Settings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.vocab import ByteVocab, keep_vocab
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints

FINGERPRINT = "a corpus"


def settings_of(**model) -> Settings:
    """Of a small model of text."""
    config = small_config(dtype="float32", param_dtype="float32", **(dict(n_vocab=264, n_layer=1, n_head=1) | model))
    return Settings(
        model=config,
        train=TrainSettings(batch_size=4, update_len=16, num_steps=10),
        data=DataSettings(source="/nowhere/corpus", validation_share=0.2),
    )


def make_run(
    workdir: pathlib.Path, settings: Settings, step: int = 3, vocab=None, changed=lambda state: state
) -> Settings:
    """Fills the folder with a state that may be changed, and returns the settings that are in its config.json."""
    vocab = vocab or ByteVocab()
    state = changed(first_state(settings, make_mesh(MeshSettings(), jax.devices()[:1])))
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    schedule = DataSchedule.begin(settings.train.batch_size, settings.train.update_len)
    checkpoints.save(state, step, run_record(settings, vocab.name, FINGERPRINT), schedule)
    assert checkpoints.wait(), checkpoints.error
    checkpoints.close()
    keep_vocab(vocab, workdir)
    if vocab.file_name:
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, vocab="sentencepiece"))
    (workdir / "config.json").write_text(to_json(settings))
    return settings
