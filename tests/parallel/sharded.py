"""A small training on any mesh: what the tests of the sharded step share."""

import jax

from tests.common import small_config
from tvq_pod.config.settings import MeshSettings, OptimizerSettings, Settings, TrainSettings
from tvq_pod.parallel.mesh import make_mesh

ROWS, UPDATE_LEN, STEPS, N_VOCAB = 8, 24, 6, 16
MODEL = dict(
    d_model=16, d_k=8, d_v=16, n_code=8, n_head=1, n_layer=2, n_vocab=N_VOCAB, block_len=3, mem_len=3, c_gamma=0.9,
    pe_abs=True, p_dropemb=0.1, p_dropsin=0.1, p_dropres=0.2, p_droplyr=0.2,
)  # fmt: skip


def settings_of(
    mesh: tuple[int, int, int, int],
    model: dict | None = None,
    *,
    microbatches: int = 1,
    fsdp: bool = True,
    update_len: int = UPDATE_LEN,
    weight_decay: float = 0.0,
) -> Settings:
    """mesh: the sizes of slices, data, sequence and model. model: changes to MODEL. The learning rate of the first step
    is 0."""
    slices, data, sequence, heads = mesh
    return Settings(
        model=small_config(**(MODEL | (model or {}))),
        train=TrainSettings(batch_size=ROWS, update_len=update_len, num_steps=STEPS, microbatches=microbatches),
        # With a larger eps, Adam makes no large steps of the noise of a gradient that is next to nothing.
        optimizer=OptimizerSettings(learning_rate=0.01, warmup_steps=1, eps=1e-4, weight_decay=weight_decay),
        mesh=MeshSettings(slices=slices, data=data, sequence=sequence, model=heads, fsdp=fsdp),
    )


def mesh_of(settings: Settings) -> jax.sharding.Mesh:
    sizes = settings.mesh
    return make_mesh(sizes, jax.devices()[: sizes.slices * sizes.data * sizes.sequence * sizes.model])
