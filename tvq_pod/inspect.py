"""--mode=inspect: what is in a run's folder, and a fingerprint to compare two runs by."""

import jax
from etils import epath

from tvq_pod.checkpoint import FINGERPRINT, Checkpoints, run_record, sha256_of
from tvq_pod.config import MeshSettings, Settings, to_json
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.sample import run_vocab
from tvq_pod.train_state import abstract_train_state


def inspect(settings: Settings, workdir: epath.Path, step: int | None) -> None:
    """Prints the config, the steps kept, each parameter's shape, dtype and sharding, their count, and two SHA-256: of
    all parameters, and of the rest of the train state (step, optimizer, recurrent state)."""
    checkpoints = Checkpoints(workdir, restore_timeout_seconds=settings.checkpoint.restore_timeout_seconds)
    steps, step = checkpoints.steps(), checkpoints.pick(step)
    record = run_record(settings, run_vocab(settings, workdir).name, fingerprint="")
    checkpoints.check(step, {name: value for name, value in record.items() if name != FINGERPRINT})
    checkpoints.check_streams(step, settings.train)
    # One device, so that any machine can look; a sharding's names are those of the run's mesh.
    mesh = make_mesh(MeshSettings(), jax.local_devices()[:1])
    state = checkpoints.restore(step, abstract_train_state(settings, mesh))
    print(to_json(settings), end="")
    print(f"steps: {' '.join(map(str, steps))}")
    print(f"step: {step}")
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    for path, leaf in leaves:
        name = "/".join(key.key for key in path)
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        print(f"{name:<44} {shape:>16} {leaf.dtype} {leaf.sharding.spec}")
    print(f"parameters: {sum(leaf.size for _, leaf in leaves)}")
    print(f"parameters_sha256: {sha256_of(state.params)}")
    print(f"train_state_sha256: {sha256_of(state.replace(params=None))}")
    checkpoints.close()
