"""Checkpoints: what a run needs to go on, written by orbax in the background, with a manifest of checksums.

    WORKDIR/checkpoints/STEP/params          the parameters, codebooks included: all that eval and sample need
    WORKDIR/checkpoints/STEP/train           step, the optimizer's state, sanity, digest of the tokens consumed
    WORKDIR/checkpoints/STEP/recurrent       every layer's recurrent state, for every stream
    WORKDIR/checkpoints/STEP/record          what these belong to: sizes of the model, corpus, seed; the course so far
    WORKDIR/checkpoints/STEP/manifest.json   size and checksum of each file, written last
    WORKDIR/checkpoints/STEP.damaged         a step whose files are not what its manifest says: set aside, never deleted
    WORKDIR/checkpoints/STEP.undone          a step that the run went back from (see sanity.py)

A step's folder appears under its name only when it is whole. It is believed only after its manifest was verified. A
record that differs from the run's is refused before any array is read.
"""

import concurrent.futures
import contextlib
import hashlib
import math
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tvq_pod import manifest
from tvq_pod.config import CheckpointSettings, Settings, TrainSettings
from tvq_pod.data.course import Course
from tvq_pod.errors import UserError
from tvq_pod.optim import STATE_VERSIONS
from tvq_pod.parallel.processes import all_agree, decided_by_first, from_first, is_first, on_first
from tvq_pod.paths import free_name, is_bucket
from tvq_pod.train_state import TrainState

FORMAT = 2
RETRY_SECONDS = 10.0  # after a save that failed
WRITERS_SECONDS = 10.0  # for threads of a save that failed to end
FINGERPRINT = "config.data.store, fingerprint"
# Settings that make another model of the same parameters, or parameters and state of another shape. The others
# (dropout, block_len, remat, the codebook's decay) may change from one session to the next.
MODEL_IDENTITY = (
    *("d_model", "d_k", "d_v", "n_head", "n_code", "n_layer", "n_vocab", "mem_len", "agg_cache"),
    *("window_bias", "attn_type", "head_type", "dtype", "param_dtype", "pe_abs", "e_tie", "e_norm", "e_scale"),
)
OPTIMIZER_STATE = "config.optimizer.name, state"
# Entries that the first checkpoints do not have, as they were then
LATER = {"config.model.window_bias": "0.0", OPTIMIZER_STATE: "1"}


def model_record(settings: Settings, vocab_name: str) -> dict:
    """What parameters belong to, as {setting's name: value}."""
    record = {f"config.model.{name}": str(getattr(settings.model, name)) for name in MODEL_IDENTITY}
    return record | {"config.data.vocab": vocab_name}


def run_record(settings: Settings, vocab_name: str, fingerprint: str) -> dict:
    """What a whole checkpoint belongs to: the model, and all that the data function depends on but its course."""
    return model_record(settings, vocab_name) | {
        "config.optimizer.name": settings.optimizer.name,
        OPTIMIZER_STATE: STATE_VERSIONS[settings.optimizer.name],
        "config.seed": str(settings.seed),
        FINGERPRINT: fingerprint,
    }


def stale_steps(steps: list[int], settings: CheckpointSettings, losses: dict[int, float]) -> list[int]:
    """The steps that need not stay. losses: validation loss of those steps that were evaluated."""
    if not settings.keep:
        return []
    kept = set(sorted(steps)[-settings.keep :])
    if settings.keep_every_steps:
        kept |= {step for step in steps if step % settings.keep_every_steps == 0}
    evaluated = sorted((step for step in steps if step in losses), key=lambda step: losses[step])
    kept |= set(evaluated[: settings.keep_best])
    return [step for step in sorted(steps) if step not in kept]


def _wait_for_writers() -> None:
    """Until orbax's threads have ended: when one fails, the others still write, and would make folders anew that
    were removed. (To join one raises its error.)"""
    deadline = time.monotonic() + WRITERS_SECONDS
    while time.monotonic() < deadline:
        if not any(type(thread).__module__.startswith("orbax.") for thread in threading.enumerate()):
            return
        time.sleep(0.05)


class Checkpoints:
    """The checkpoints of one run. All processes of a job call the same methods in the same order."""

    def __init__(
        self,
        workdir: epath.Path,
        settings: CheckpointSettings | None = None,
        on_saved: Callable[[int], None] = lambda step: None,
    ):
        """settings: of a run that writes; None for one that only reads, and makes no folder. on_saved: is called with
        every step that is on disk and good, on process 0, in a thread."""
        workdir = epath.Path(workdir)
        self.path = (workdir if is_bucket(workdir) else workdir.absolute()) / "checkpoints"
        self._settings, self._on_saved = settings, on_saved
        if settings is None and not self.path.is_dir():
            raise UserError(f"--workdir={workdir}: has no checkpoint; train there first")
        self._saving: int | None = None
        self._saved: concurrent.futures.Future | None = None
        self._failed_at = 0.0
        self._losses: dict[int, float] = {}
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                params=ocp.StandardCheckpointHandler(),
                train=ocp.StandardCheckpointHandler(),
                recurrent=ocp.StandardCheckpointHandler(),
                record=ocp.JsonCheckpointHandler(),
            ),
            async_options=ocp.AsyncOptions(
                timeout_secs=settings.timeout_seconds if settings else 600,
                post_finalization_callback=self._add_manifest,
            ),
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        if settings is not None:
            on_first(self._tidy)

    # ------------------------------------------------------------------ which there are

    def steps(self) -> list[int]:
        """Steps that are there and whole, in order."""
        if not self.path.is_dir():
            return []
        named = [path for path in self.path.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name)]
        return sorted(int(path.name) for path in named if not is_bucket(path) or (path / "commit_success.txt").exists())

    def pick(self, step: int | None) -> int:
        """`step`, or for None the newest that is as it was written. For those that only read: nothing is set aside.

        Raises UserError if it is not there, or damaged.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"--workdir={self.path.parent}: has no checkpoint; train there first")
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: there are {', '.join(map(str, steps))}")
        for candidate in reversed(steps) if step is None else [step]:
            if self._is_good(candidate):
                return candidate
        which = "every checkpoint" if step is None else f"--step={step}"
        raise UserError(f"--workdir={self.path.parent}: {which} is damaged; there are {', '.join(map(str, steps))}")

    def newest_good(self) -> int | None:
        """The newest step whose files are what its manifest says; None if nothing was ever saved. Those newer ones that
        are damaged are set aside.

        Raises UserError if there were checkpoints, and none is good: a run must not start over without being told.
        """
        while (step := from_first(max(self.steps(), default=-1))) != -1:
            if self._is_good(step):
                return step
            on_first(lambda step=step: self._set_aside(step, "damaged"))
        set_aside = self.path.is_dir() and sorted(path.name for path in self.path.glob("*.damaged*"))
        if set_aside:
            raise UserError(
                f"--workdir={self.path.parent}: has no good checkpoint left ({', '.join(set_aside)} in {self.path}); "
                "bring one back from a copy, or start over in another folder"
            )
        return None

    def _is_good(self, step: int) -> bool:
        """Whether the step's files are what its manifest says; each process looks at its share of them.

        Raises UserError if a host can't read them, or they look damaged to one and whole to process 0: that is no
        damage, but a folder that is not mounted everywhere.
        """
        found = self._problems(step, jax.process_index(), jax.process_count())
        for problem in found:
            print(f"DAMAGED: {problem}", file=sys.stderr, flush=True)
        if all_agree(not found):
            return True
        if jax.process_count() > 1 and decided_by_first(is_first() and not self._problems(step)):
            raise UserError(
                f"--workdir={self.path.parent}: step {step} is whole where process 0 is, and not on every host; all "
                "must see the same folder"
            )
        return False

    def _problems(self, step: int, part: int = 0, of: int = 1) -> list[str]:
        try:
            return manifest.problems(self.path / str(step), part, of)
        except OSError as error:
            raise UserError(
                f"--workdir={self.path.parent}: {error.filename or self.path} can't be read ({error.strerror}); mend "
                "that, and start again"
            ) from None

    def undo(self, after: int) -> None:
        """Sets aside all steps after that one."""

        def set_aside():
            for step in self.steps():
                if step > after:
                    self._set_aside(step, "undone")

        on_first(set_aside)

    # ------------------------------------------------------------------ writing

    def save(self, state: TrainState, step: int, record: dict, course: Course, retain_all: bool = False) -> None:
        """Copies the state to the host, returns, and writes in the background; `busy` and `error` say how it goes.

        The save before this one must be done. Does nothing if the step is there. retain_all: deletes no older step, not
        even one that need not stay.
        """
        there, room = 1, 2
        verdict = from_first(there if step in self.steps() else 0 if self._has_room(state) else room)
        if verdict == there:
            return
        self._saving = step
        if verdict == room:
            self._failed(OSError("the disk has not enough room for it"))
            return
        train = dict(step=state.step, opt_state=state.opt_state, sanity=state.sanity, digest=state.digest)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train),
            recurrent=ocp.args.StandardSave(state.recurrent),
            record=ocp.args.JsonSave(dict(record, format=FORMAT, course=course.to_json())),
        )
        try:
            self._checkpointer.save(self.path / str(step), args=items)
        except Exception as error:  # each store has its own
            self._saved = self._pool.submit(self._clear, error)
            return
        self._saved = self._pool.submit(self._finish, step, retain_all)

    def _has_room(self, state: TrainState) -> bool:
        """Whether the disk has room for all of it, and takes new files: where process 0 alone fails, the others wait
        for it for minutes. Compressed, and on a bucket, it may take less: that is tried."""
        if is_bucket(self.path) or not self.path.exists():
            return True
        trial = self.path / "trial"
        try:
            trial.mkdir(exist_ok=True)
            trial.rmdir()
        except OSError:
            return False
        return shutil.disk_usage(self.path).free > sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def _failed(self, error: Exception) -> None:
        self._failed_at = time.monotonic()
        self._saved = concurrent.futures.Future()
        self._saved.set_exception(error)

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._saved is not None and not self._saved.done()

    @property
    def error(self) -> str:
        """Why the last save could not be written; "" if it could, or is being."""
        error = None if self._saved is None or self.busy else self._saved.exception()
        return "" if error is None else " ".join(str(error).split())[-200:] or repr(error)

    def wait(self) -> bool:
        """Until the last save is on disk. Whether it is."""
        if self._saved is not None:
            concurrent.futures.wait([self._saved])
        return not self.error

    @property
    def failing(self) -> bool:
        """Whether the last save failed, and it is too early to try again."""
        return bool(self.error) and time.monotonic() < self._failed_at + RETRY_SECONDS

    def close(self) -> None:
        """Waits as `wait` does, and ends orbax's threads."""
        self.wait()
        self._pool.shutdown()
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            self._checkpointer.close()

    def _add_manifest(self) -> None:
        """Called by orbax on process 0, when all of a step is written and before it gets its name."""
        final = self.path / str(self._saving)
        draft = next(iter(self.path.glob(f"{self._saving}.orbax-checkpoint-tmp*")), final)
        manifest.write_manifest(draft)

    def _finish(self, step: int, retain_all: bool) -> None:
        """In the background: raises if the save fails; afterwards process 0 deletes what need not stay."""
        try:
            self._checkpointer.wait_until_finished()
        except BaseException as error:
            self._clear(error)
        if not is_first():
            return
        found = manifest.problems(self.path / str(step))
        if found:
            self._set_aside(step, "damaged")
            self._failed_at = time.monotonic()
            raise OSError(found[0])
        self._on_saved(step)
        with contextlib.suppress(OSError):  # what should go, goes with the next save
            if not retain_all:  # the newest step is good: older ones may go
                for stale in stale_steps(self.steps(), self._settings, self._losses):
                    self._delete(stale)
            self._tidy()

    def _clear(self, error: BaseException) -> NoReturn:
        """After a save that failed, so that the next one can succeed; raises what it failed with."""
        self._failed_at = time.monotonic()
        for _ in range(2):  # orbax keeps errors of two kinds, and would raise the other one at the next save
            with contextlib.suppress(Exception):
                self._checkpointer.wait_until_finished()
        _wait_for_writers()
        if is_first():  # what was written of it is in the way, and takes room
            self._tidy()
        raise error

    def know_losses(self, losses: dict[int, float | None]) -> None:
        """Validation losses, by step: the best are kept. One that is None or not finite is no good one."""
        self._losses |= {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}

    def _delete(self, step: int) -> None:
        """By another name first: a kill in between leaves no half of a step behind."""
        doomed = self.path / f"{step}.deleting"
        if not is_bucket(self.path):
            (self.path / str(step)).rename(doomed)
            doomed.rmtree(missing_ok=True)
        else:
            (self.path / str(step) / "commit_success.txt").unlink(missing_ok=True)
            (self.path / str(step)).rmtree(missing_ok=True)

    def _tidy(self) -> None:
        """Removes what a killed or failed save, or deletion, left behind."""
        if self.path.is_dir():
            for pattern in ("*.orbax-checkpoint-tmp*", "*.deleting"):
                for path in self.path.glob(pattern):
                    with contextlib.suppress(OSError):  # a thread of the failed save may still write there
                        path.rmtree(missing_ok=True)

    def _set_aside(self, step: int, why: str) -> None:
        target = free_name(self.path / f"{step}.{why}")
        (self.path / str(step)).rename(target)
        print(f"{why.upper()}: checkpoint {self.path / str(step)} is set aside as {target.name}", file=sys.stderr)

    # ------------------------------------------------------------------ reading

    def record(self, step: int) -> dict:
        """What `step` belongs to. Raises UserError if it is of another version's format."""
        saved = self._restore(step, record=ocp.args.JsonRestore())["record"]
        if saved.get("format") != FORMAT:
            raise UserError(f"{self.path}/{step}: has format {saved.get('format')}; this version reads {FORMAT}")
        return saved

    def check(self, step: int, record: dict) -> None:
        """Raises UserError naming the first setting in which the checkpoint's record differs from `record`
        (see run_record; entries that `record` lacks are not looked at)."""
        saved = self.record(step)
        for name, value in record.items():
            made_with = saved.get(name, LATER.get(name))
            if made_with != value and name == OPTIMIZER_STATE:
                raise UserError(
                    f"config.optimizer.name={record['config.optimizer.name']}: the checkpoint {self.path}/{step} has "
                    f"this optimizer's state in form {made_with}, and this version reads form {value} only; give "
                    "another --workdir, or continue with the version that wrote it"
                )
            if made_with != value:
                raise UserError(
                    f"{name}={value}: the checkpoint {self.path}/{step} was made with {made_with}; "
                    "give that, or another --workdir"
                )

    def check_streams(self, step: int, settings: TrainSettings) -> None:
        """Raises UserError if the checkpoint's recurrent state is of other streams than the settings say."""
        saved = self.course(step).now
        for name in ("batch_size", "update_len"):
            now, then = getattr(settings, name), getattr(saved, name)
            if now != then:
                raise UserError(
                    f"config.train.{name}={now}: the checkpoint {self.path}/{step} was made with {then}; "
                    "give that, or another --workdir, or config.train.on_batch_change=restart_streams"
                )

    def course(self, step: int) -> Course:
        """The course that led to `step`."""
        return Course.from_json(self.record(step)["course"])

    def restore(self, step: int, abstract: TrainState, with_recurrent: bool = True) -> TrainState:
        """The state of `step`, in the shapes, dtypes and shardings of `abstract`.

        with_recurrent: whether the recurrent state is read; None stands in its place if not.
        """
        train = dict(step=abstract.step, opt_state=abstract.opt_state, sanity=abstract.sanity, digest=abstract.digest)
        items = dict(params=ocp.args.StandardRestore(abstract.params), train=ocp.args.StandardRestore(train))
        if with_recurrent:
            items["recurrent"] = ocp.args.StandardRestore(abstract.recurrent)
        restored = self._restore(step, **items)
        return TrainState(params=restored["params"], recurrent=restored.get("recurrent"), **restored["train"])

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """Only the parameters, in the shapes, dtypes and shardings of `abstract_params`."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def _restore(self, step: int, **items):
        """Raises UserError if the files can't be read; orbax's own errors then are of many kinds."""
        try:
            return self._checkpointer.restore(self.path / str(step), args=ocp.args.Composite(**items))
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
