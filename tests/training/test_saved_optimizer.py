"""A checkpoint holds the optimizer's state as it always has: the weights' chain by number, and no array of a codebook.

The layout is written out here by hand, so that a change of it is seen: runs of older versions could not go on.
"""

import contextlib
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.common import small_config
from tvq_pod.config.identity import run_record
from tvq_pod.config.settings import CheckpointSettings, MeshSettings, Settings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.training.step import TrainState, abstract_train_state

SETTINGS = Settings(
    model=small_config(n_layer=1, d_model=128, n_vocab=130),
    train=TrainSettings(batch_size=8, update_len=8, num_steps=10),
)
UNIT = {
    "norm/scale": (1, 128), "u": (1, 2, 6), "v": (1, 2, 6), "w_q/kernel": (1, 2, 6, 128), "w_k/kernel": (1, 2, 6, 128),
    "w_v/kernel": (1, 2, 8, 128), "w_g/kernel": (1, 2, 8, 128), "w_r/kernel": (1, 2, 6, 128),
    "w_o/kernel": (1, 2, 8, 128),
}  # fmt: skip
WEIGHTS = {f"layers/{unit}/{name}": shape for unit in ("unit0", "unit1") for name, shape in UNIT.items()}
WEIGHTS |= {"embedding": (130, 128), "norm_out/scale": (128,), "w_out": (128, 130)}
CODEBOOKS = {f"layers/{unit}/quantizer/{name}" for unit in ("unit0", "unit1") for name in ("codebook", "count")}
# Adafactor's moments of matrices with at least 128 rows and columns
FACTORED = {"embedding/rows": (130,), "embedding/columns": (128,), "w_out/rows": (128,), "w_out/columns": (130,)}
WHOLE = {name: shape for name, shape in WEIGHTS.items() if name not in ("embedding", "w_out")}
MOMENTS = dict(
    adamw={f"{moment}/{name}": shape for moment in ("mu", "nu") for name, shape in WEIGHTS.items()},
    lion={f"mu/{name}": shape for name, shape in WEIGHTS.items()},
    adafactor={f"moments/{name}": shape for name, shape in (WHOLE | FACTORED).items()},
    sgd={f"trace/{name}": shape for name, shape in WEIGHTS.items()},
)
MOMENTS["nadamw"] = MOMENTS["adamw"]
# Muon's: the momentum of kernels, and Adam's moments of all else
KERNELS = {name: shape for name, shape in WEIGHTS.items() if name.endswith("kernel")}
MATRIX, OTHER = "inner_states/matrix/inner_state/0", "inner_states/other/inner_state"
MUON = {f"{MATRIX}/mu/{name}": shape for name, shape in KERNELS.items()}
MUON |= {f"{MATRIX}/count": (), f"{MATRIX}/ns_coeffs": (3,), f"{OTHER}/count": ()}
MUON |= {f"{OTHER}/{m}/{name}": shape for m in ("mu", "nu") for name, shape in WEIGHTS.items() if name not in KERNELS}


def settings_of(name: str) -> Settings:
    return dataclasses.replace(SETTINGS, optimizer=dataclasses.replace(SETTINGS.optimizer, name=name))


def abstract_of(name: str) -> TrainState:
    return abstract_train_state(settings_of(name), make_mesh(MeshSettings(), jax.devices()[:1]))


def counted(abstract):
    """Arrays whose numbers are all different."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.permutation(x.size).reshape(x.shape), x.dtype), abstract)


def saved(workdir: pathlib.Path, name: str, state: TrainState) -> Checkpoints:
    checkpoints = Checkpoints(workdir, CheckpointSettings())
    checkpoints.save(state, 3, run_record(settings_of(name), "bytes", "corpus"), DataSchedule.begin(8, 8))
    assert checkpoints.wait(), checkpoints.error
    return checkpoints


def on_disk(workdir: pathlib.Path) -> tuple[dict, dict]:
    """What a checkpoint has of the optimizer's state, by path: all of it, and the shapes of the arrays."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(workdir / "checkpoints/3/train").tree["opt_state"]
    found = {"/".join(path): leaf for path, leaf in ocp.tree.to_flat_dict(tree, keep_empty_nodes=True).items()}
    return found, {path: tuple(leaf.shape) for path, leaf in found.items() if hasattr(leaf, "shape")}


@pytest.mark.slow(2)
def test_muon_s_layout_on_disk(tmp_path):
    saved(tmp_path, "muon", counted(abstract_of("muon"))).close()
    _, arrays = on_disk(tmp_path)
    assert arrays == {f"inner_state/1/{path}": shape for path, shape in MUON.items()} | {"inner_state/4/count": ()}


@pytest.mark.slow(4)
@pytest.mark.parametrize("name", MOMENTS)
def test_the_layout_on_disk_is_the_one_that_it_has_always_been(tmp_path, name):
    saved(tmp_path, name, counted(abstract_of(name))).close()
    found, arrays = on_disk(tmp_path)
    steps = {f"inner_state/1/{path}": shape for path, shape in MOMENTS[name].items()}
    counts = {"inner_state/4/count": ()} | ({} if name == "sgd" else {"inner_state/1/count": ()})
    assert arrays == steps | counts
    # what is empty has its place too, and orbax compares those
    trees = {path.split("/")[0] for path in MOMENTS[name]}
    empty = {f"inner_state/1/{tree}/{path}" for tree in trees for path in CODEBOOKS}
    empty |= {"inner_state/0", "inner_state/2", "inner_state/3/inner_state"}
    assert found.keys() - arrays.keys() == empty


def test_a_state_that_was_saved_before_codebooks_were_part_of_the_optimizer_is_restored(tmp_path):
    """The weights' chain was masked then, as here; it is optax's own, with a number in every array."""
    abstract = abstract_of("adamw")
    is_weight = jax.tree_util.tree_map_with_path(
        lambda path, _: "quantizer" not in jax.tree_util.keystr(path), abstract.params
    )
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.scale(1.0),
        optax.masked(optax.identity(), lambda params: jax.tree.map(lambda _: True, params)),
        optax.scale_by_learning_rate(lambda step: 1.0),
    )
    older = counted(jax.eval_shape(optax.masked(chain, is_weight).init, abstract.params))
    state = counted(abstract).replace(opt_state=older)
    checkpoints = saved(tmp_path, "adamw", state)
    restored = checkpoints.restore(3, abstract)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(abstract)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, older)
