"""Loads tasks of lm-evaluation-harness by name, and evaluates a model on them."""

import contextlib
import difflib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from tvq_pod.errors import UserError
from tvq_pod.inference.lm_eval_model import HarnessModel

BOOTSTRAP_ITERS = 1000  # resamples for a standard error without a formula; the harness's 100,000 take minutes
YAML = (".yaml", ".yml")


class Tasks:
    """Tasks and groups of tasks, with their data."""

    def __init__(self, names: Sequence[str]):
        """names: tasks, groups or tags of the harness, patterns (`mmlu_*`), or YAML files in the harness's format.

        Raises UserError for a name that does not exist or a task that can't be loaded.
        """
        files = [name for name in names if name.endswith(YAML)]
        for name in files:
            if not pathlib.Path(name).is_file():
                raise UserError(f"--tasks={name}: the file does not exist; give a task's YAML file, or a task's name")
        try:
            needs_index = _needs_index(names)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--tasks={','.join(names)}: can't be read ({error})") from None
        self._manager = TaskManager(include_defaults=needs_index)  # takes seconds
        wanted = [found for name in names for found in ([name] if name in files else self._named(name))]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                loaded = self._manager.load(wanted)
        except Exception as error:  # any error of a file, a dataset or the network
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"--tasks={','.join(names)}: can't be loaded ({what})") from error
        groups = loaded.get("groups", {})
        inside = {part.name for group in groups.values() for part in group.get_all_groups() if part is not group}
        inside |= {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        parts: list[Any] = [*groups.values(), *loaded["tasks"].values()]
        self._outermost = [part for part in parts if _name(part) not in inside]

    def _named(self, name: str) -> list[str]:
        if found := self._manager.match_tasks([name]):
            return found
        near = difflib.get_close_matches(name, self._manager.all_tasks, 3)
        meant = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
        raise UserError(f"--tasks={name}: is not a task of lm-evaluation-harness; {meant}")

    def evaluate(self, model: HarnessModel, num_fewshot: int | None, limit: int | None) -> "Results":
        """Evaluates the model. num_fewshot: examples before each question; None: as each task says. limit: the most
        documents of each task; None: all. Raises what the model's methods raise."""
        os.environ["DISABLE_MULTIPROC"] = "1"  # otherwise the harness forks, which may hang a process that runs jax
        with contextlib.redirect_stdout(sys.stderr):
            results = simple_evaluate(
                model=model,
                tasks=self._outermost,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=False,
                task_manager=self._manager,
            )
        assert results is not None, "it is, on another rank than 0"
        return Results(dict(results))


class Results:
    """The results of the harness."""

    def __init__(self, found: dict):
        self._found = found

    def json(self) -> str:
        """The results file, in the harness's own format."""
        return json.dumps(self._found, indent=2, default=handle_non_serializable, ensure_ascii=False)

    def line(self) -> dict:
        """The scores by task or group, for one line."""
        return json.loads(json.dumps(self._found["results"], default=handle_non_serializable))

    def tables(self) -> list[str]:
        """The harness's tables, line by line."""
        tables = [make_table(self._found)]
        if self._found.get("groups"):
            tables.append(make_table(self._found, "groups"))
        return [line for table in tables for line in table.splitlines()]


def _name(part: Task | Group) -> str:
    return part.name if isinstance(part, Group) else part.task_name


def _needs_index(names: Sequence[str]) -> bool:
    """Whether tasks must be found by name: names on the command line, or in the file of a group."""
    return any(not name.endswith(YAML) or "\ngroup:" in f"\n{pathlib.Path(name).read_text()}" for name in names)
