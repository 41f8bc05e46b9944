"""Checkpoints, which orbax writes in the background, with a manifest of checksums. checkpoint_reader.py describes their
content, step_folders.py their folder.
"""

import concurrent.futures
import contextlib
import math
import secrets
import shutil
import time
from collections.abc import Callable
from typing import NoReturn

import jax
import orbax.checkpoint as ocp
from etils import epath

from tvq_pod.config.settings import CheckpointSettings
from tvq_pod.data.schedule import DataSchedule
from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket
from tvq_pod.parallel.deadlines import Deadline
from tvq_pod.parallel.processes import (
    all_agree,
    from_process_zero,
    is_process_zero,
    on_process_zero,
    text_from_process_zero,
)
from tvq_pod.run import manifest, orbax_files
from tvq_pod.run.checkpoint_reader import FORMAT, CheckpointReader, handler
from tvq_pod.run.saved_state import State, train_item
from tvq_pod.run.step_folders import stale_steps

RETRY_SECONDS = 10.0  # after a save that failed
WRITERS_SECONDS = 10.0  # to wait for the threads of a failed save to end


def _wait_for_writers() -> None:
    """Waits until orbax's threads have ended: when one fails, the others still write, and would make folders again that
    were removed. (Joining one raises its error.)"""
    deadline = time.monotonic() + WRITERS_SECONDS
    while time.monotonic() < deadline:
        if not orbax_files.is_writing():
            return
        time.sleep(0.05)


class Checkpoints(CheckpointReader):
    """The checkpoints of a run that trains. All processes of a job call the same methods in the same order."""

    def __init__(
        self,
        workdir: epath.PathLike,
        settings: CheckpointSettings,
        on_saved: Callable[[int], None] = lambda step: None,
        before_named: Callable[[], object] = lambda: None,
    ):
        """on_saved: called with every step that is on disk and good, on process 0, in a thread. before_named: called
        there too, before a step gets its name."""
        self._open(workdir, settings.restore_timeout_seconds)
        self._settings, self._on_saved, self._before_named = settings, on_saved, before_named
        self._branches: list[list] | None = None  # see `begin`
        self._ancestry: list[dict] = []  # see `descend_from`
        self._saving: int | None = None
        self._saved: concurrent.futures.Future | None = None
        self._failed_at = 0.0
        self._losses: dict[int, float] = {}
        self._checkpointer = self._writer = ocp.AsyncCheckpointer(
            handler(),
            async_options=ocp.AsyncOptions(
                timeout_secs=settings.timeout_seconds, post_finalization_callback=self._add_manifest
            ),
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        on_process_zero(self._folders.tidy)

    # ------------------------------------------------------------------ where a run resumes

    def newest_good(self) -> int | None:
        """The newest step whose files match its manifest; None if nothing was ever saved. Newer steps, which are
        damaged, are set aside.

        Raises UserError if there are checkpoints but none is good: a run must not start over unless it is told to.
        """
        with self._reading(f"verifying the checkpoints in {self.path}"):
            while (step := from_process_zero(max(self.steps(), default=-1))) != -1:
                if self._is_good(step):
                    return step
                on_process_zero(lambda step=step: self._folders.set_aside(step, "damaged"))
        set_aside = sorted(path.name for path in self._folders.entries("*.damaged*"))
        if set_aside:
            raise UserError(
                f"--workdir={self.path.parent}: has no good checkpoint left ({', '.join(set_aside)} in {self.path}); "
                "restore one from a copy, or start over in another folder"
            )
        return None

    def _writing(self) -> Deadline:
        """A deadline for waiting for a save. Orbax itself gives up a save after the time of the setting, and it is
        tried again; waiting for twice that time means that it would never end."""
        seconds = self._settings.timeout_seconds
        return Deadline(f"a save of {self.path}", 2 * seconds, f"config.checkpoint.timeout_seconds={seconds}")

    def undo(self, after: int) -> None:
        """Sets aside all steps later than `after`."""

        def set_aside():
            for step in reversed(self.steps()):  # newest first, so that a kill leaves steps without a gap
                if step > after:
                    self._folders.set_aside(step, "undone")

        on_process_zero(set_aside)

    def begin(self, step: int | None) -> None:
        """Starts a branch with a name of its own: training begins from the state of `step`, or from the seed if None.

        Every checkpoint's record has the branches that led to it, as [first step, name]. So an evaluation of the same
        step on another branch is not mistaken for this one's, when a run was started over, went back, or was resumed
        from an older checkpoint. All losses after `step` are forgotten.
        """
        first = step or 0
        before = [] if step is None else super().branches(step)
        self._branches = [branch for branch in before if branch[0] < first]
        self._branches.append([first, text_from_process_zero(secrets.token_hex(4))])
        self._ancestry = [] if step is None else super().ancestry(step)
        self._losses = {step: loss for step, loss in self._losses.items() if step <= first}

    def descend_from(self, ancestry: list[dict]) -> None:
        """Records in every checkpoint that this training took its weights from another run; see
        training/warm_start.py."""
        self._ancestry = ancestry

    def branches(self, step: int) -> list[list]:
        """The branches of the training that `begin` started, or else of the checkpoint on disk."""
        return super().branches(step) if self._branches is None else self._branches

    def save(self, state: State, step: int, record: dict, schedule: DataSchedule, retain_all: bool = False) -> None:
        """Copies the state to the host, returns, and writes in the background; `busy` and `error` report the outcome.

        The previous save must be done. Does nothing if the step already exists. retain_all: deletes no older step, not
        even one that need not be kept.
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
            self._failed(OSError("the disk does not have enough room for it"))
            return
        average = {} if state.ema is None else dict(ema=ocp.args.StandardSave(state.ema))
        if self._ancestry:
            record = dict(record, ancestry=self._ancestry)
        items = ocp.args.Composite(
            **average,
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train_item(state)),
            recurrent=ocp.args.StandardSave(state.recurrent),
            record=ocp.args.JsonSave(  # `course` is the data schedule, by the name that older versions read
                dict(record, format=FORMAT, course=schedule.to_json(), branches=self._branches or [])
            ),
        )
        try:
            self._writer.save(self.path / str(step), args=items)
        except Exception as error:  # each kind of storage has its own
            self._saved = self._pool.submit(self._clear, error)
            return
        self._saved = self._pool.submit(self._finish, step, retain_all)

    def _has_room(self, state: State) -> bool:
        """Whether the disk has room for the complete state, and new files can be made: if process 0 alone failed, the
        others would wait for it for minutes. A state that may be compressed, or goes to a bucket, may need less room,
        so it is tried."""
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
        """The reason why the last save could not be written; "" if it was written or is being written."""
        error = None if self._saved is None or self.busy else self._saved.exception()
        return "" if error is None else " ".join(str(error).split())[-200:] or repr(error)

    def wait(self) -> bool:
        """Waits until the last save is on disk. Returns whether it is."""
        if self._saved is not None and self.busy:
            with self._writing():
                concurrent.futures.wait([self._saved])
        return not self.error

    def wait_for_all(self) -> bool:
        """Waits until the last save of all processes is on disk. Returns whether it is."""
        with self._writing():
            return all_agree(self.wait())

    @property
    def failing(self) -> bool:
        """Whether the last save failed, and it is too early to try again."""
        return bool(self.error) and time.monotonic() < self._failed_at + RETRY_SECONDS

    def close(self) -> None:
        """Waits for the last save, and ends orbax's threads."""
        with self._writing():
            self.wait()
            self._pool.shutdown()
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                self._checkpointer.close()

    def _add_manifest(self) -> None:
        """Writes the manifest. Orbax calls this on process 0 when a step is completely written and does not have its
        name yet."""
        self._before_named()
        final = self.path / str(self._saving)
        draft = next(self._folders.entries(orbax_files.drafts(str(self._saving))), final)
        manifest.write_manifest(draft)

    def _finish(self, step: int, retain_all: bool) -> None:
        """Finishes a save in the background: raises if the save fails; afterwards process 0 deletes steps that need not
        be kept."""
        try:
            self._writer.wait_until_finished()
        except BaseException as error:
            self._clear(error)
        if not is_process_zero():
            return
        found = manifest.problems(self.path / str(step))
        if found:
            self._folders.set_aside(step, "damaged")
            self._failed_at = time.monotonic()
            raise OSError(found[0])
        self._on_saved(step)
        with contextlib.suppress(OSError):  # what could not be deleted is deleted after the next save
            if not retain_all:  # the newest step is good: older ones may be deleted
                for stale in stale_steps(self.steps(), self._settings, self._losses):
                    self._folders.delete(stale)
            self._folders.tidy()

    def _clear(self, error: BaseException) -> NoReturn:
        """Cleans up after a failed save, so that the next one can succeed; raises the save's error."""
        self._failed_at = time.monotonic()
        for _ in range(2):  # orbax keeps two kinds of errors, and would raise the other one at the next save
            with contextlib.suppress(Exception):
                self._writer.wait_until_finished()
        _wait_for_writers()
        if is_process_zero():  # the incomplete step is in the way, and takes room
            self._folders.tidy()
        raise error

    def know_losses(self, losses: dict[int, float | None]) -> None:
        """Adds validation losses, by step, of which the best checkpoints are kept. A loss that is None or not finite is
        never among the best."""
        self._losses |= {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
