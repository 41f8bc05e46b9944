"""--mode=export: writing the model of a checkpoint to a folder that other programs can read, with one that samples."""

import jax
import jax.numpy as jnp
from etils import epath

from tvq_pod.config.identity import FINGERPRINT, model_record
from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.data.open import run_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.files import check_vacant
from tvq_pod.host.terminal import say
from tvq_pod.inference.exported import WEIGHTS, Origin, write_exported
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint_reader import IMPORTED, CheckpointReader
from tvq_pod.training.step import abstract_train_state


def export(settings: Settings, workdir: epath.Path, folder: epath.Path, step: int | None, dtype: str | None) -> None:
    """Writes a checkpoint's model to `folder`, which must be new. step: None for the newest. dtype: of the weights;
    None for config.model.param_dtype. Codebooks stay float32."""
    check_vacant("--to", folder, WEIGHTS)
    if settings.model.attn_type != "vq":
        raise UserError(
            f"config.model.attn_type={settings.model.attn_type}: can't be exported, since the output of quadratic "
            "attention depends on config.train.update_len, and its state grows with it; export a model with vq"
        )
    checkpoints = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
    step = checkpoints.pick(step)
    vocab = run_vocab(settings, workdir)
    checkpoints.check(step, model_record(settings, vocab.name))
    check_vocab_fits(settings, vocab.n_vocab)
    record = checkpoints.record(step)
    origin = Origin(**record[IMPORTED]) if IMPORTED in record else Origin(step, record[FINGERPRINT])
    abstract = abstract_train_state(settings, make_mesh(MeshSettings(), jax.local_devices()))
    params = jax.device_get(checkpoints.restore_params(step, abstract.params, settings.eval.weights))
    checkpoints.close()
    dtype = dtype or jnp.dtype(settings.model.param_dtype).name
    write_exported(folder, params, settings, vocab, origin, dtype)
    n_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f"step {step}: {n_params:,} parameters, {dtype}, are in {folder}; {folder}/generate.py samples from them")
