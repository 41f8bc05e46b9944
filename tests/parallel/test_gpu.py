"""What runs on a GPU, as far as a machine without one can tell: the programs lower for CUDA."""

import re

import jax
import jax.numpy as jnp
import pytest

from tests.common import small_config
from tvq_pod.config.settings import MeshSettings, Settings, TrainSettings
from tvq_pod.nn.pallas.fit import why_not
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.training.step import abstract_batch, abstract_train_state, make_train_step

OWN = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}  # marks for XLA's partitioner, not calls


def calls(lowered: jax.stages.Lowered) -> set[str]:
    """Names of the custom calls: code that some library has to bring for the platform."""
    return set(re.findall(r"custom_call @\"?([\w.$]+)", lowered.as_text())) - OWN


@pytest.mark.slow(5)
@pytest.mark.parametrize(
    ("mesh", "widths"),
    [
        (dict(), dict(head_type="shga", n_head=1)),
        (dict(sequence=2, model=2), dict(head_type="mha", n_head=2)),
    ],
)
def test_a_step_lowers_for_cuda_without_calls_of_another_platform(eight_devices, mesh, widths):
    mesh = make_mesh(MeshSettings(**mesh), eight_devices)
    model = small_config(n_layer=2, is_train=True, dtype=jnp.bfloat16, c_revive=0.1, p_dropemb=0.1, n_code=8, **widths)
    settings = Settings(model=model, train=TrainSettings(batch_size=8, update_len=32))
    step = make_train_step(settings, mesh)
    state, batch = abstract_train_state(settings, mesh), abstract_batch(settings, mesh)
    traced = step.program.trace(state.replace(recurrent={}), state.recurrent, batch)
    assert calls(traced.lower(lowering_platforms=("cuda",))) == set()


def test_such_calls_would_be_seen():
    def kernel(x):
        return jnp.linalg.qr(x)[0]

    traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct((4, 4), jnp.float32))
    assert calls(traced.lower(lowering_platforms=("cpu",)))


def test_the_kernels_are_not_for_gpus():
    config = small_config(block_len=128, mem_len=128, d_v=128, n_code=64, d_k=8, n_head=1, dtype=jnp.bfloat16)
    assert "NVIDIA H100" in (why_not(config, "NVIDIA H100 80GB HBM3", 1) or "")
