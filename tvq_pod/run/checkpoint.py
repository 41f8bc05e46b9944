"""Checkpoints: what a run needs to go on, written by orbax in the background, with a manifest of checksums.

    WORKDIR/checkpoints/STEP/params          the parameters, codebooks included: all that eval and sample need
    WORKDIR/checkpoints/STEP/train           step, the optimizer's state, what bad steps are judged by, digest of tokens
    WORKDIR/checkpoints/STEP/recurrent       every layer's recurrent state, for every stream
    WORKDIR/checkpoints/STEP/record          what these belong to: sizes of the model, corpus, seed; the schedule so far
    WORKDIR/checkpoints/STEP/manifest.json   size and checksum of each file, written last
    WORKDIR/checkpoints/STEP.damaged         a step whose files are not what its manifest says: set aside, never deleted
    WORKDIR/checkpoints/STEP.undone          a step that the run went back from (see training/bad_steps.py)

A step's folder appears under its name only when it is whole. It is believed only after its manifest was verified. A
record that differs from the run's is refused before any array is read.
"""

import concurrent.futures
import contextlib
import fnmatch
import hashlib
import json
import math
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Protocol, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tvq_pod.config.identity import OPTIMIZER_STATE, differing
from tvq_pod.config.settings import CheckpointSettings, TrainSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.host.files import free_name
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import tell
from tvq_pod.parallel.deadlines import Deadline
from tvq_pod.parallel.processes import (
    all_agree,
    decided_by_process_zero,
    from_process_zero,
    is_process_zero,
    on_process_zero,
    text_from_process_zero,
)
from tvq_pod.run import manifest

FORMAT = 2
RETRY_SECONDS = 10.0  # after a save that failed
WRITERS_SECONDS = 10.0  # for threads of a save that failed to end


class State(Protocol):
    """What is saved of training: a TrainState, or any dataclass of pytrees with these fields."""

    @property
    def step(self) -> jax.Array: ...
    @property
    def params(self) -> dict: ...
    @property
    def opt_state(self) -> Any: ...
    @property
    def recurrent(self) -> dict | None: ...
    @property
    def bad_steps(self) -> dict: ...
    @property
    def digest(self) -> jax.Array: ...

    def replace(self, **changes) -> Self: ...


S = TypeVar("S", bound=State)


def newest_record(workdir: epath.Path) -> tuple[epath.Path, dict] | None:
    """The newest step's folder and its record, for what can be refused early: only the record's file is read, and it is
    not verified. None if there is no step, or its record can't be read."""
    path = epath.Path(workdir) / "checkpoints"
    with contextlib.suppress(OSError, ValueError):
        newest = path / str(max(_steps_in(path)))
        return newest, json.loads((newest / "record" / "metadata").read_text())
    return None


def _steps_in(path: epath.Path) -> list[int]:
    """Steps in a folder of checkpoints that are there and whole, in order."""
    if not path.is_dir():
        return []
    named = [step for step in path.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", step.name)]
    return sorted(int(step.name) for step in named if not is_bucket(step) or (step / "commit_success.txt").exists())


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
        before_named: Callable[[], object] = lambda: None,
        restore_timeout_seconds: int = CheckpointSettings.restore_timeout_seconds,
    ):
        """settings: of a run that writes; None for one that only reads, and makes no folder. on_saved: is called with
        every step that is on disk and good, on process 0, in a thread. before_named: is called there too, before a step
        gets its name. restore_timeout_seconds: the setting, for one that only reads."""
        workdir = epath.Path(workdir)
        self.path = (workdir if is_bucket(workdir) else workdir.absolute()) / "checkpoints"
        self._settings, self._on_saved, self._before_named = settings, on_saved, before_named
        self._branches: list[list] | None = None  # see `begin`
        self._restore_timeout = settings.restore_timeout_seconds if settings else restore_timeout_seconds
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
            on_process_zero(self._tidy)

    def _reading(self, what: str) -> Deadline:
        seconds = self._restore_timeout
        return Deadline(what, seconds, f"config.checkpoint.restore_timeout_seconds={seconds}")

    def _writing(self) -> Deadline:
        """Orbax gives a save up by itself once its time is over, and it is tried again. Twice that time, and what waits
        for it never ends."""
        seconds = (self._settings or CheckpointSettings()).timeout_seconds
        return Deadline(f"a save of {self.path}", 2 * seconds, f"config.checkpoint.timeout_seconds={seconds}")

    # ------------------------------------------------------------------ which there are

    def steps(self) -> list[int]:
        """Steps that are there and whole, in order."""
        return _steps_in(self.path)

    def _entries(self, pattern: str) -> Iterator[epath.Path]:
        """What is in the folder, by name. (epath's glob would take `[` in the folder's own path for a pattern.)"""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return (self.path / name for name in names if fnmatch.fnmatchcase(name, pattern))

    def pick(self, step: int | None) -> int:
        """`step`, or for None the newest that is as it was written. For those that only read: nothing is set aside.

        Raises UserError if it is not there, or damaged.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"--workdir={self.path.parent}: has no checkpoint; train there first")
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: there are {', '.join(map(str, steps))}")
        with self._reading(f"verifying the checkpoints in {self.path}"):
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
        with self._reading(f"verifying the checkpoints in {self.path}"):
            while (step := from_process_zero(max(self.steps(), default=-1))) != -1:
                if self._is_good(step):
                    return step
                on_process_zero(lambda step=step: self._set_aside(step, "damaged"))
        set_aside = sorted(path.name for path in self._entries("*.damaged*"))
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
            tell(f"DAMAGED: {problem}")
        if all_agree(not found):
            return True
        if jax.process_count() > 1 and decided_by_process_zero(is_process_zero() and not self._problems(step)):
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

        on_process_zero(set_aside)

    # ------------------------------------------------------------------ what tells them apart

    def begin(self, step: int | None) -> None:
        """Training begins, from the state of `step`, or for None from the seed: a branch with a name of its own.

        Every checkpoint's record has the branches that led to it, as [first step, name]. So what was evaluated on
        another branch is not taken for this one's, though its step is the same: of a run that was started over, that
        went back, or that was resumed from an older checkpoint. All losses after `step` are forgotten.
        """
        first = step or 0
        before = [] if step is None else self.record(step).get("branches", [])
        self._branches = [branch for branch in before if branch[0] < first]
        self._branches.append([first, text_from_process_zero(secrets.token_hex(4))])
        self._losses = {step: loss for step, loss in self._losses.items() if step <= first}

    def identity(self, step: int) -> str:
        """What no other checkpoint is called: `step` and its branch, as "20-1f0c33a7". Of the training that began, or
        else of the checkpoint on disk; "" for those of older versions."""
        branches = self.record(step).get("branches", []) if self._branches is None else self._branches
        names = [name for first, name in branches if first < step]
        return f"{step}-{names[-1]}" if names else ""

    # ------------------------------------------------------------------ writing

    def save(self, state: State, step: int, record: dict, schedule: DataSchedule, retain_all: bool = False) -> None:
        """Copies the state to the host, returns, and writes in the background; `busy` and `error` say how it goes.

        The save before this one must be done. Does nothing if the step is there. retain_all: deletes no older step, not
        even one that need not stay.
        """
        with self._writing():
            self._begin_save(state, step, record, schedule, retain_all)

    def _begin_save(self, state: State, step: int, record: dict, schedule: DataSchedule, retain_all: bool) -> None:
        there, room = 1, 2
        verdict = from_process_zero(there if step in self.steps() else 0 if self._has_room(state) else room)
        if verdict == there:
            return
        self._saving = step
        if verdict == room:
            self._failed(OSError("the disk has not enough room for it"))
            return
        train = dict(step=state.step, opt_state=state.opt_state, sanity=state.bad_steps, digest=state.digest)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train),
            recurrent=ocp.args.StandardSave(state.recurrent),
            record=ocp.args.JsonSave(
                dict(record, format=FORMAT, course=schedule.to_json(), branches=self._branches or [])
            ),
        )
        try:
            self._checkpointer.save(self.path / str(step), args=items)
        except Exception as error:  # each store has its own
            self._saved = self._pool.submit(self._clear, error)
            return
        self._saved = self._pool.submit(self._finish, step, retain_all)

    def _has_room(self, state: State) -> bool:
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
        if self.busy:
            with self._writing():
                concurrent.futures.wait([self._saved])
        return not self.error

    def wait_for_all(self) -> bool:
        """Until the last save is on disk, of all processes. Whether it is."""
        with self._writing():
            return all_agree(self.wait())

    @property
    def failing(self) -> bool:
        """Whether the last save failed, and it is too early to try again."""
        return bool(self.error) and time.monotonic() < self._failed_at + RETRY_SECONDS

    def close(self) -> None:
        """Waits as `wait` does, and ends orbax's threads."""
        with self._writing():
            self.wait()
            self._pool.shutdown()
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                self._checkpointer.close()

    def _add_manifest(self) -> None:
        """Called by orbax on process 0, when all of a step is written and before it gets its name."""
        self._before_named()
        final = self.path / str(self._saving)
        draft = next(self._entries(f"{self._saving}.orbax-checkpoint-tmp*"), final)
        manifest.write_manifest(draft)

    def _finish(self, step: int, retain_all: bool) -> None:
        """In the background: raises if the save fails; afterwards process 0 deletes what need not stay."""
        try:
            self._checkpointer.wait_until_finished()
        except BaseException as error:
            self._clear(error)
        if not is_process_zero():
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
        if is_process_zero():  # what was written of it is in the way, and takes room
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
        for pattern in ("*.orbax-checkpoint-tmp*", "*.deleting"):
            for path in self._entries(pattern):
                with contextlib.suppress(OSError):  # a thread of the failed save may still write there
                    path.rmtree(missing_ok=True)

    def _set_aside(self, step: int, why: str) -> None:
        target = free_name(self.path / f"{step}.{why}")
        (self.path / str(step)).rename(target)
        tell(f"{why.upper()}: checkpoint {self.path / str(step)} is set aside as {target.name}")

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
        if found := differing(record, self.record(step)):
            name, value, made_with = found
            if name == OPTIMIZER_STATE:
                raise UserError(
                    f"config.optimizer.name={record['config.optimizer.name']}: the checkpoint {self.path}/{step} has "
                    f"this optimizer's state in form {made_with}, and this version reads form {value} only; give "
                    "another --workdir, or continue with the version that wrote it"
                )
            raise UserError(
                f"{name}={value}: the checkpoint {self.path}/{step} was made with {made_with}; "
                "give that, or another --workdir"
            )

    def check_streams(self, step: int, settings: TrainSettings) -> None:
        """Raises UserError if the checkpoint's recurrent state is of other streams than the settings say."""
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

        with_recurrent: whether the recurrent state is read; None stands in its place if not.
        """
        train = dict(
            step=abstract.step, opt_state=abstract.opt_state, sanity=abstract.bad_steps, digest=abstract.digest
        )
        items = dict(params=ocp.args.StandardRestore(abstract.params), train=ocp.args.StandardRestore(train))
        if with_recurrent:
            items["recurrent"] = ocp.args.StandardRestore(abstract.recurrent)
        restored = self._restore(step, **items)
        train = dict(restored["train"])
        train["bad_steps"] = train.pop("sanity")
        return abstract.replace(params=restored["params"], recurrent=restored.get("recurrent"), **train)

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """Only the parameters, in the shapes, dtypes and shardings of `abstract_params`."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def _restore(self, step: int, **items):
        """Raises UserError if the files can't be read; orbax's own errors then are of many kinds."""
        try:
            with self._reading(f"reading the checkpoint {self.path}/{step}"):
                return self._checkpointer.restore(self.path / str(step), args=ocp.args.Composite(**items))
        except (KeyError, OSError, TypeError, ValueError) as error:
            if found := self._other_arrays(step, items):
                raise UserError(
                    f"--workdir={self.path.parent}: {found}; the checkpoint is not damaged: "
                    "give the config that it was made with, or another --workdir"
                ) from error
            raise UserError(
                f"{self.path}/{step}: can't be read ({str(error)[:200]}); "
                "if it is damaged, move it away, and the step before it is used"
            ) from error

    def _other_arrays(self, step: int, items: dict) -> str:
        """The first array in which what is saved differs in shape from what was asked for; "" if none does."""
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
                        f"the array {item}/{name} has the shape {then} in checkpoint {step}, and {now} by this config"
                    )
        return ""


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a tree of arrays, or of descriptions of them, by its path."""
    flat = ocp.tree.to_flat_dict(tree)
    return {"/".join(map(str, path)): tuple(x.shape) for path, x in flat.items() if hasattr(x, "shape")}


def sha256_of(tree) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a tree's arrays, in the order of their paths."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return sha256_of_arrays((path, np.asarray(leaves[path])) for path in sorted(leaves))


def sha256_of_arrays(named: Iterable[tuple[str, np.ndarray]]) -> str:
    """`sha256_of` the arrays that are given one after the other with their paths, in the paths' order. None is held
    longer than it takes to hash it."""
    digest = hashlib.sha256()
    for path, array in named:
        array = np.ascontiguousarray(array)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
        del array  # before the next one is read
    return digest.hexdigest()
