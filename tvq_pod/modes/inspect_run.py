"""--mode=inspect: showing what is in a run's folder, with hashes by which two runs can be compared.

Arrays are read, hashed and printed one after the other on the host, so memory for the largest one is enough.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tvq_pod.config.identity import FINGERPRINT, run_record
from tvq_pod.config.run_config import to_json
from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.data.open import run_vocab
from tvq_pod.errors import UserError
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.hashes import sha256_of_arrays
from tvq_pod.run.saved_state import saved_name, train_item
from tvq_pod.training.step import TrainState, abstract_train_state
from tvq_pod.training.warm_start import ancestor_line


def inspect(settings: Settings, workdir: epath.Path, step: int | None) -> None:
    """Prints the config, the steps kept and set aside, the checkpoints of other runs that this one descends from, each
    parameter's shape, dtype and sharding, their count, and SHA-256 hashes of all parameters, of their moving average if
    the checkpoint has one, and of the rest of the train state (step, optimizer, recurrent state)."""
    checkpoints = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
    steps, step = checkpoints.steps(), checkpoints.pick(step)
    record = run_record(settings, run_vocab(settings, workdir).name, fingerprint="")
    checkpoints.check(step, {name: value for name, value in record.items() if name != FINGERPRINT})
    checkpoints.check_streams(step, settings.train)
    # The mesh is only needed for the names of shardings, which are the run's: no array is placed on it.
    mesh = make_mesh(MeshSettings(), jax.local_devices()[:1])
    abstract = abstract_train_state(settings, mesh)
    print(to_json(settings), end="")
    print(f"steps: {' '.join(map(str, steps))}")
    if aside := checkpoints.set_aside():
        print(f"set aside: {' '.join(aside)}")
    print(f"step: {step}")
    for entry in checkpoints.ancestry(step):
        print(ancestor_line(entry))
    parameters = _printed(abstract.params, _reader(checkpoints.path / str(step) / "params", abstract.params))
    parameters_sha256 = sha256_of_arrays(parameters)
    print(f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(abstract.params))}")
    print(f"parameters_sha256: {parameters_sha256}", flush=True)
    if checkpoints.has_ema(step):
        print(f"ema_sha256: {sha256_of_arrays(_average(checkpoints.path / str(step), abstract.params))}", flush=True)
    print(f"train_state_sha256: {sha256_of_arrays(_rest(checkpoints.path / str(step), abstract))}")
    checkpoints.close()


def _printed(abstract: dict, read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters in the order of their paths, and prints a line for each."""
    leaves = {jax.tree_util.keystr(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    for name in sorted(leaves):
        path, leaf = leaves[name]
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        print(f"{'/'.join(key.key for key in path):<44} {shape:>16} {leaf.dtype} {leaf.sharding.spec}", flush=True)
        yield name, read(name)


def _average(folder: epath.Path, abstract_params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the moving average of the parameters in the order of their paths."""
    read = _reader(folder / "ema", abstract_params)
    paths = (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params))
    for name in sorted(paths):
        yield name, read(name)


def _rest(folder: epath.Path, abstract: TrainState) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the rest of the train state in the order of its paths."""
    readers = {
        "train": _reader(folder / "train", train_item(abstract)),
        "recurrent": _reader(folder / "recurrent", abstract.recurrent),
    }
    arrays = {}  # by the name that is hashed, which is the checkpoint's
    for path, _ in jax.tree_util.tree_leaves_with_path(dataclasses.replace(abstract, params=None, ema=None)):
        name, below = saved_name(path[0].name), jax.tree_util.keystr(path[1:])
        arrays[f".{name}{below}"] = ("recurrent", below) if name == "recurrent" else ("train", f"[{name!r}]{below}")
    for name, (item, place) in sorted(arrays.items()):
        yield name, readers[item](place)


def _reader(folder: epath.Path, abstract) -> Callable[[str], np.ndarray]:
    """Returns a function that reads one array of a checkpoint's item to the host, by its path (jax.tree_util.keystr).

    folder: the item's; abstract: its tree, whose leaves have the expected shapes. Only that array is read, in the dtype
    that it was saved in. The function raises UserError if it can't be read or has another shape.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    places = {jax.tree_util.keystr(path): place for place, (path, _) in enumerate(leaves)}
    on_host = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves))

    def read(name: str) -> np.ndarray:
        place, leaf = places[name], leaves[places[name]][1]
        only_this = structure.unflatten([leaf if n == place else ocp.PLACEHOLDER for n in range(len(leaves))])
        arguments = ocp.args.PyTreeRestore(item=only_this, restore_args=on_host)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                array = structure.flatten_up_to(checkpointer.restore(folder, args=arguments))[place]
            if array.shape != leaf.shape:
                raise ValueError(f"it has the shape {array.shape}, but {leaf.shape} by this config")
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}: the array {name} can't be read ({str(error)[:200]}); "
                "give the config that the checkpoint was made with"
            ) from error
        return array

    return read
