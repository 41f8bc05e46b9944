"""--mode=import: making a new run, whose step 0 has the model, from a folder that --mode=export wrote."""

import dataclasses
import math

import jax
from etils import epath

from tvq_pod.config.identity import FINGERPRINT, SEED, differing, model_record, run_record
from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.resolve import resolve
from tvq_pod.config.run_config import read_run_config, to_json
from tvq_pod.config.settings import CheckpointSettings, MeshSettings, Settings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.data.vocab import keep_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.files import check_vacant, new_folder, write_whole
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say
from tvq_pod.inference.exported import params_of, read_exported
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import IMPORTED
from tvq_pod.run.lock import locked
from tvq_pod.run.step_folders import StepFolders
from tvq_pod.training.step import abstract_train_state, train_state_with
from tvq_pod.training.warm_start import ancestor


def import_model(settings: Settings, workdir: epath.Path, folder: epath.Path) -> None:
    """Makes `workdir`, which must be new, from the model in `folder`: config.json, the vocabulary, and checkpoint 0,
    with the optimizer's first state and streams that have read nothing.

    settings: those of `folder`; the user may have changed any that do not define the model. The checkpoint's record
    names neither a corpus nor a seed, so training may start with any. Raises UserError for a folder that does not fit,
    before anything is written.
    """
    check_vacant("--workdir", workdir, "config.json")
    if steps := StepFolders(workdir / "checkpoints").steps():  # in a bucket, from a killed import
        raise UserError(f"--workdir={workdir}: has checkpoint {steps[-1]} but no config.json; give a new folder")
    exported = read_exported(folder)
    _check_same_model(settings, folder, exported.vocab.name)
    check_vocab_fits(settings, exported.vocab.n_vocab)
    # As many devices as the rows can be split over: the state of a large model may need more than one.
    n_devices = math.gcd(settings.train.batch_size, jax.local_device_count())
    mesh = make_mesh(MeshSettings(), jax.local_devices()[:n_devices])
    params = params_of(exported.tensors, abstract_train_state(settings, mesh).params, folder)
    if file_name := exported.vocab.file_name:
        kept = workdir / file_name if is_bucket(workdir) else workdir.absolute() / file_name
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, vocab=str(kept)))
    record = run_record(settings, exported.vocab.name, fingerprint="")
    record = {name: value for name, value in record.items() if name not in (FINGERPRINT, SEED)}
    state = train_state_with(params, settings, mesh)
    # config.json is written last: without it, no command takes the folder for a run.
    with new_folder("--workdir", workdir) as draft, locked(draft):
        keep_vocab(exported.vocab, draft)
        checkpoints = Checkpoints(draft, CheckpointSettings())
        whence = folder if is_bucket(folder) else folder.absolute()
        origin, n_layers = exported.origin, settings.model.n_layer
        checkpoints.descend_from([ancestor(str(whence), origin.step, "", origin.fingerprint, n_layers)])
        schedule = DataSchedule.begin(settings.train.batch_size, settings.train.update_len)
        checkpoints.save(state, 0, record | {IMPORTED: exported.origin._asdict()}, schedule)
        checkpoints.close()
        if checkpoints.error:
            raise OSError(checkpoints.error)
        write_whole(draft / "config.json", to_json(settings))
    say(f"the model of {folder} is checkpoint 0 of {workdir}: train, evaluate or sample there")


def _check_same_model(settings: Settings, folder: epath.Path, vocab_name: str) -> None:
    """Raises UserError if a setting that the model's function depends on was changed."""
    own = resolve(read_run_config(folder, "--from"))
    if found := differing(model_record(settings, vocab_name), model_record(own, vocab_name)):
        name, value, exported = found
        raise UserError(f"{name}={value}: the model in {folder} has {exported}; leave this setting as it is")
