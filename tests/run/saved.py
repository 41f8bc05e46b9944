"""What tests of checkpoints save: a small state, its record and its data schedule."""

import jax
import numpy as np

from tests.common import small_config
from tvq_pod.config.identity import run_record
from tvq_pod.config.settings import OptimizerSettings, Settings, TrainSettings
from tvq_pod.data.schedule import DataSchedule

SETTINGS = Settings(
    model=small_config(n_layer=1),
    train=TrainSettings(batch_size=8, update_len=8, num_steps=10),
    optimizer=OptimizerSettings(learning_rate=0.1, warmup_steps=0),
)
RECORD = run_record(SETTINGS, "bytes", "corpus-a")
SCHEDULE = DataSchedule.begin(8, 8).skipping(3, 2).with_contexts(2, "0:16,9:0")


def a_batch(mesh, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, size=[8, 8]).astype(np.int32)
    batch = dict(
        inputs=tokens, targets=tokens, doc_ids=np.zeros([8, 8], np.int32), loss_mask=np.ones([8, 8], np.float32)
    )
    return jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))


def damage(workdir, step):
    """One bit of an array's data, which orbax itself would restore without a word."""
    path = max((workdir / f"checkpoints/{step}/params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())
