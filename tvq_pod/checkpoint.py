"""Checkpoints: what a run needs to go on, written asynchronously by orbax.

    WORKDIR/checkpoints/STEP/params     the parameters, codebooks included: all that eval and sample need
    WORKDIR/checkpoints/STEP/train      step, the optimizer's state, every layer's recurrent state
    WORKDIR/checkpoints/STEP/record     what these belong to: sizes of the model, corpus, seed, batch, update length

A step's folder appears under its name only when it is whole. A record that differs from the run's is refused before any
array is read.
"""

import contextlib
import hashlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tvq_pod.config import Settings
from tvq_pod.errors import UserError
from tvq_pod.paths import is_bucket
from tvq_pod.train_state import TrainState

FORMAT = 1
FINGERPRINT = "config.data.store, fingerprint"
# Settings that make another model of the same parameters, or parameters and state of another shape. The others
# (dropout, block_len, remat, the codebook's decay) may change from one session to the next.
MODEL_IDENTITY = (
    *("d_model", "d_k", "d_v", "n_head", "n_code", "n_layer", "n_vocab", "mem_len", "agg_cache", "attn_type"),
    *("head_type", "dtype", "param_dtype", "pe_abs", "e_tie", "e_norm", "e_scale"),
)


def model_record(settings: Settings, vocab_name: str) -> dict:
    """What parameters belong to, as {setting's name: value}."""
    record = {f"config.model.{name}": str(getattr(settings.model, name)) for name in MODEL_IDENTITY}
    return record | {"config.data.vocab": vocab_name}


def run_record(settings: Settings, vocab_name: str, fingerprint: str) -> dict:
    """What a whole checkpoint belongs to: the model, and all that the data function depends on."""
    return model_record(settings, vocab_name) | {
        "config.optimizer.name": settings.optimizer.name,
        "config.seed": str(settings.seed),
        "config.train.batch_size": str(settings.train.batch_size),
        "config.train.update_len": str(settings.train.update_len),
        FINGERPRINT: fingerprint,
    }


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: epath.Path, keep: int = 0, read_only: bool = False):
        """keep: how many of the newest steps stay; 0 keeps all. read_only: never writes, and makes no folder."""
        self.path = (workdir if is_bucket(workdir) else workdir.absolute()) / "checkpoints"
        if read_only and not self.path.is_dir():
            raise UserError(f"--workdir={workdir}: has no checkpoint; train there first")
        policy = preservation_policy.LatestN(n=keep) if keep else preservation_policy.PreserveAll()
        options = (
            ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
            if read_only
            else ocp.CheckpointManagerOptions(preservation_policy=policy)
        )
        self._manager = ocp.CheckpointManager(
            self.path,
            options=options,
            item_handlers=dict(
                params=ocp.StandardCheckpointHandler(),
                train=ocp.StandardCheckpointHandler(),
                record=ocp.JsonCheckpointHandler(),
            ),
        )

    def steps(self) -> list[int]:
        """Steps that are there and whole, in order."""
        return sorted(self._manager.all_steps())

    def pick(self, step: int | None) -> int:
        """`step`, or the newest for None. Raises UserError if it is not there."""
        steps = self.steps()
        if not steps:
            raise UserError(f"--workdir={self.path.parent}: has no checkpoint; train there first")
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: there are {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def save(self, state: TrainState, step: int, record: dict) -> None:
        """Copies the state to the host, returns, and writes in the background.

        Raises UserError if the save before this one could not be written.
        """
        train = dict(step=state.step, opt_state=state.opt_state, recurrent=state.recurrent)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train),
            record=ocp.args.JsonSave(dict(record, format=FORMAT)),
        )
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def record(self, step: int) -> dict:
        """What `step` belongs to."""
        return self._restore(step, record=ocp.args.JsonRestore())["record"]

    def check(self, step: int, record: dict) -> None:
        """Raises UserError naming the first setting in which the checkpoint's record differs from `record`
        (see run_record; entries that `record` lacks are not looked at)."""
        saved = self.record(step)
        if saved.get("format") != FORMAT:
            raise UserError(f"{self.path}/{step}: has format {saved.get('format')}; this version reads {FORMAT}")
        for name, value in record.items():
            if saved.get(name) != value:
                raise UserError(
                    f"{name}={value}: the checkpoint {self.path}/{step} was made with {saved.get(name)}; "
                    "give that, or another --workdir"
                )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, in the shapes, dtypes and shardings of `abstract`."""
        train = dict(step=abstract.step, opt_state=abstract.opt_state, recurrent=abstract.recurrent)
        restored = self._restore(
            step, params=ocp.args.StandardRestore(abstract.params), train=ocp.args.StandardRestore(train)
        )
        return TrainState(params=restored["params"], **restored["train"])

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """Only the parameters, in the shapes, dtypes and shardings of `abstract_params`."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def wait(self) -> None:
        """Until what was saved is on disk. Raises UserError if it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and ends orbax's threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"--workdir={self.path.parent}: a checkpoint can't be written ({str(error)[-200:]}); "
                "those before it are whole; make room and start again"
            ) from error

    def _restore(self, step: int, **items):
        """Raises UserError if the files can't be read; orbax's own errors then are of many kinds."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path}/{step}: can't be read ({str(error)[:200]}); "
                "if it is damaged, move it away, and the step before it is used"
            ) from error


def sha256_of(tree) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a tree's arrays, in the order of their paths."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for path in sorted(leaves):
        array = np.ascontiguousarray(np.asarray(leaves[path]))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
