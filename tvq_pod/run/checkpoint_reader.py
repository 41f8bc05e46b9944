"""Reading checkpoints: which step is good, what it belongs to, and its arrays.

    WORKDIR/checkpoints/STEP/params, train, recurrent, ema     the state; see saved_state.py
    WORKDIR/checkpoints/STEP/record          what these belong to: sizes of the model, corpus, seed; the data schedule
    WORKDIR/checkpoints/STEP/manifest.json   size and checksum of each file, written last

A step is trusted only after its manifest was verified. A record that differs from the run's is refused before any array
is read.
"""

import contextlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tvq_pod.config.identity import FINGERPRINT, OPTIMIZER_STATE, differing
from tvq_pod.config.settings import CheckpointSettings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say, tell
from tvq_pod.parallel.deadlines import Deadline
from tvq_pod.parallel.processes import (
    all_agree,
    decided_by_process_zero,
    is_process_zero,
    text_from_process_zero,
)
from tvq_pod.run import manifest
from tvq_pod.run.saved_state import S, from_items, saved_name, train_item
from tvq_pod.run.step_folders import StepFolders

FORMAT = 2
ITEMS = dict(raw="params", ema="ema")  # of a checkpoint, by their names in config.eval.weights
IMPORTED = "imported"  # in a record made by --mode=import: where its parameters come from


def handler() -> ocp.CompositeCheckpointHandler:
    """Orbax's handler for the items of a checkpoint."""
    return ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(),
        train=ocp.StandardCheckpointHandler(),
        recurrent=ocp.StandardCheckpointHandler(),
        ema=ocp.StandardCheckpointHandler(),
        record=ocp.JsonCheckpointHandler(),
    )


class CheckpointReader:
    """The checkpoints of a run, read-only: no folder is made, and no step is set aside.

    All processes of a job call the same methods in the same order.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        restore_timeout_seconds: int = CheckpointSettings.restore_timeout_seconds,
        given_by: str = "",
    ):
        """given_by: the name of the run in errors, as SETTING=VALUE; --workdir=WORKDIR if empty. Raises UserError if
        the run has no checkpoint."""
        self._open(workdir, restore_timeout_seconds, given_by)
        if not self.path.is_dir():
            raise UserError(f"{given_by or f'--workdir={workdir}'}: has no checkpoint; train there first")
        self._checkpointer: ocp.Checkpointer = ocp.Checkpointer(handler())

    def _open(self, workdir: epath.PathLike, restore_timeout_seconds: int, given_by: str = "") -> None:
        workdir = epath.Path(workdir)
        self.path = (workdir if is_bucket(workdir) else workdir.absolute()) / "checkpoints"
        self._folders = StepFolders(self.path)
        self._here, self._is_workdir = given_by or f"--workdir={self.path.parent}", not given_by
        self._restore_timeout = restore_timeout_seconds

    def close(self) -> None:
        """Ends orbax's threads."""
        self._checkpointer.close()

    def steps(self) -> list[int]:
        """Complete steps, in order."""
        return self._folders.steps()

    def set_aside(self) -> list[str]:
        """The names of the folders of steps that were set aside: damaged ones, and those that the run went back
        from."""
        return self._folders.aside()

    def steps_of_process_zero(self) -> list[int]:
        """Process 0's `steps`, on all processes: a run that trains meanwhile may add and delete some."""
        return [int(step) for step in text_from_process_zero(" ".join(map(str, self.steps()))).split()]

    def _reading(self, what: str) -> Deadline:
        seconds = self._restore_timeout
        return Deadline(what, seconds, f"config.checkpoint.restore_timeout_seconds={seconds}")

    def pick(self, step: int | None) -> int:
        """`step`, or for None the newest step that is not damaged. This is read-only: no step is set aside.

        Raises UserError if it does not exist, or is damaged.
        """
        steps = self.steps_of_process_zero()
        if not steps:
            raise UserError(f"{self._here}: has no checkpoint; train there first")
        named = f"--step={step}" if self._is_workdir else self._here
        if step is not None and step not in steps:
            raise UserError(f"{named}: has no such checkpoint; give one of {', '.join(map(str, steps))}")
        with self._reading(f"verifying the checkpoints in {self.path}"):
            for candidate in reversed(steps) if step is None else [step]:
                if self._is_good(candidate):
                    return candidate
        which = "every checkpoint" if step is None else f"--step={step}" if self._is_workdir else f"step {step}"
        raise UserError(f"{self._here}: {which} is damaged; the checkpoints are {', '.join(map(str, steps))}")

    def _is_good(self, step: int) -> bool:
        """Whether the step's files match its manifest; each process checks its share of them.

        Raises UserError if a host can't read them, or if one finds them damaged and process 0 complete: then they are
        not damaged, but the folder is not mounted everywhere.
        """
        found = self._problems(step, jax.process_index(), jax.process_count())
        for problem in found:
            tell(f"DAMAGED: {problem}")
        if all_agree(not found):
            return True
        if jax.process_count() > 1 and decided_by_process_zero(is_process_zero() and not self._problems(step)):
            raise UserError(
                f"{self._here}: step {step} is complete on the host of process 0, but not on every host; all "
                "must see the same folder"
            )
        return False

    def _problems(self, step: int, part: int = 0, of: int = 1) -> list[str]:
        try:
            return manifest.problems(self.path / str(step), part, of)
        except OSError as error:
            raise UserError(
                f"{self._here}: {error.filename or self.path} can't be read ({error.strerror}); fix "
                "this, and start again"
            ) from None

    def record(self, step: int) -> dict:
        """The record of `step`, which says what it belongs to. Raises UserError if it has another version's format."""
        saved = self._restore(step, record=ocp.args.JsonRestore())["record"]
        if saved.get("format") != FORMAT:
            raise UserError(f"{self.path}/{step}: has format {saved.get('format')}; this version reads {FORMAT}")
        return saved

    def check(self, step: int, record: dict) -> None:
        """Raises UserError naming the first setting in which the checkpoint's record differs from `record`
        (see run_record; entries that `record` lacks are not compared)."""
        if found := differing(record, self.record(step)):
            name, value, made_with = found
            if name == OPTIMIZER_STATE:
                raise UserError(
                    f"config.optimizer.name={record['config.optimizer.name']}: the checkpoint {self.path}/{step} has "
                    f"this optimizer's state in form {made_with}, and this version reads form {value} only; give "
                    "another --workdir, or continue with the version that wrote it"
                )
            instead = ", or config.train.on_data_change=restart_streams" if name == FINGERPRINT else ""
            raise UserError(
                f"{name}={value}: the checkpoint {self.path}/{step} was made with {made_with}; "
                f"give that, or another --workdir{instead}"
            )

    def check_streams(self, step: int, settings: TrainSettings) -> None:
        """Raises UserError if the checkpoint's recurrent state belongs to other streams than those of the settings."""
        saved = self.schedule(step).now
        for name in ("batch_size", "update_len"):
            now, then = getattr(settings, name), getattr(saved, name)
            if now != then:
                raise UserError(
                    f"config.train.{name}={now}: the checkpoint {self.path}/{step} was made with {then}; "
                    "give that, or another --workdir, or config.train.on_batch_change=restart_streams"
                )

    def schedule(self, step: int) -> DataSchedule:
        """The schedule that led to `step`."""
        return DataSchedule.from_json(self.record(step)["course"])

    def restore(self, step: int, abstract: S, with_recurrent: bool = True) -> S:
        """The state of `step`, in the shapes, dtypes and shardings of `abstract`.

        with_recurrent: whether the recurrent state is read; if not, the field is None. So is the average of the weights
        if the checkpoint has none.
        """
        train = train_item(abstract)
        items = dict(params=ocp.args.StandardRestore(abstract.params), train=ocp.args.StandardRestore(train))
        if with_recurrent:
            items["recurrent"] = ocp.args.StandardRestore(abstract.recurrent)
        if abstract.ema is not None and self.has_ema(step):
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        restored = self._restore(step, **items)
        return from_items(
            abstract, restored["params"], restored["train"], restored.get("recurrent"), restored.get("ema")
        )

    def restore_params(self, step: int, abstract_params: dict, weights: str = "raw") -> dict:
        """The parameters alone, in the shapes, dtypes and shardings of `abstract_params`.

        weights: raw; or ema, which is their moving average if the checkpoint has one. Prints a line if the average is
        read.
        """
        item = self.weights(step, weights)
        if item == "ema":
            say(f"the weights are their moving average at step {step}; config.eval.weights=raw: those of the step")
        return self._restore(step, **{ITEMS[item]: ocp.args.StandardRestore(abstract_params)})[ITEMS[item]]

    def restore_weights_and_optimizer(self, step: int, abstract: S) -> tuple[dict, Any]:
        """The parameters and the optimizer's state, in the shapes, dtypes and shardings of `abstract`."""
        items = dict(
            params=ocp.args.StandardRestore(abstract.params), train=ocp.args.StandardRestore(train_item(abstract))
        )
        restored = self._restore(step, **items)
        return restored["params"], restored["train"][saved_name("opt_state")]

    def has_ema(self, step: int) -> bool:
        """Whether `step` has the moving average of the parameters."""
        return (self.path / str(step) / ITEMS["ema"]).is_dir()

    def weights(self, step: int, wanted: str) -> str:
        """The weights of `step`, ema or raw, that are used when config.eval.weights is `wanted`."""
        return "ema" if wanted == "ema" and self.has_ema(step) else "raw"

    def _restore(self, step: int, **items):
        """Reads items of a step. Raises UserError if the files can't be read, for which orbax has errors of many
        kinds."""
        try:
            with self._reading(f"reading the checkpoint {self.path}/{step}"):
                return self._checkpointer.restore(self.path / str(step), args=ocp.args.Composite(**items))
        except (KeyError, OSError, TypeError, ValueError) as error:
            if step not in self._folders.steps():
                raise UserError(
                    f"{self.path}/{step}: was deleted while it was being read, since a run that trains deletes its "
                    "older checkpoints; try again"
                ) from error
            if found := self._other_arrays(step, items):
                raise UserError(
                    f"{self._here}: {found}; the checkpoint is not damaged: give the config that it was made with, or "
                    f"another {self._here.partition('=')[0]}"
                ) from error
            raise UserError(
                f"{self.path}/{step}: can't be read ({str(error)[:200]}); "
                "if it is damaged, move it away, so that the previous step is used"
            ) from error

    def _other_arrays(self, step: int, items: dict) -> str:
        """A description of the first saved array whose shape is not the expected one; "" if there is none."""
        for item, asked in items.items():
            if not isinstance(asked, ocp.args.StandardRestore):
                continue
            try:
                with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                    saved = _shapes(handler.metadata(self.path / str(step) / item).tree)
            except (KeyError, OSError, TypeError, ValueError):
                continue
            wanted = _shapes(asked.item)
            for name in sorted(saved.keys() | wanted.keys()):
                if saved.get(name) != wanted.get(name):
                    then, now = (shapes.get(name, "none") for shapes in (saved, wanted))
                    return (
                        f"the array {item}/{name} has the shape {then} in checkpoint {step} but {now} with this config"
                    )
        return ""

    def branches(self, step: int) -> list[list]:
        """The branches that led to `step`, as [first step, name]; see Checkpoints.begin."""
        return self.record(step).get("branches", [])

    def ancestry(self, step: int) -> list[dict]:
        """The checkpoints of other runs that `step` descends from, the latest first; see training/warm_start.py."""
        return self.record(step).get("ancestry", [])

    def identity(self, step: int) -> str:
        """A name that no other checkpoint has: `step` and its branch, as "20-1f0c33a7"; "" for those of older
        versions."""
        names = [name for first, name in self.branches(step) if first < step]
        return f"{step}-{names[-1]}" if names else ""


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every array in a tree of arrays, or of descriptions of arrays, by its path."""
    flat = ocp.tree.to_flat_dict(tree)
    return {"/".join(map(str, path)): tuple(x.shape) for path, x in flat.items() if hasattr(x, "shape")}
