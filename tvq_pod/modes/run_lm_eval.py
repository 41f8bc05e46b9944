"""--mode=lm_eval: evaluating a checkpoint of the run on tasks of lm-evaluation-harness."""

import json
import time

from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require
from tvq_pod.host.files import Unwritten, write_whole
from tvq_pod.host.terminal import say
from tvq_pod.inference.opened import OpenedRun
from tvq_pod.parallel.processes import is_process_zero, on_process_zero


def run_lm_eval(
    settings: Settings,
    workdir: epath.Path,
    step: int | None,
    tasks: list[str],
    num_fewshot: int | None,
    limit: int | None,
    max_length: int | None,
) -> None:
    """Evaluates a checkpoint of the run in `workdir` on tasks, prints their scores, and writes them into WORKDIR/eval.

    The harness runs on process 0, which asks the others to compute with it. tasks, num_fewshot, limit: see
    inference/lm_eval_tasks.py. max_length: see HarnessModel. Rows are split over all devices. Raises UserError for
    mistakes that the user can correct; if they are about a task or a checkpoint, before anything is compiled.
    """
    require("lm_eval", "--mode=lm_eval: lm-evaluation-harness")
    from tvq_pod.inference.lm_eval_model import HarnessModel, SharedModel
    from tvq_pod.inference.lm_eval_tasks import Tasks

    if not tasks:
        raise UserError("--tasks=: must be given for --mode=lm_eval: names of tasks, such as hellaswag, or YAML files")
    run = OpenedRun(settings, workdir, step, "--mode=lm_eval")
    loaded: list[Tasks] = []
    on_process_zero(lambda: loaded.append(Tasks(tasks)))
    shared, failed = SharedModel(run.model), None
    described = dict(
        model="tvq_pod", workdir=str(workdir), step=run.step, checkpoint=run.checkpoints.identity(run.step),
        weights=run.weights, cache=settings.eval.cache, max_length=max_length, model_dtype=str(settings.model.dtype),
    )  # fmt: skip
    results = []
    if is_process_zero():
        model = HarnessModel(shared, run.vocab, max_length, described)
        try:
            results.append(loaded[0].evaluate(model, num_fewshot, limit))
        except Exception as error:
            failed = error
        shared.end()
    else:
        shared.serve()

    def finish() -> None:
        if failed is not None:
            raise failed
        (found,) = results
        for line in found.tables():
            say(line)
        unwritten, folder = Unwritten(), workdir / "eval"
        path = folder / f"lm_eval_step_{run.step}_{time.strftime('%Y-%m-%dT%H-%M-%S')}.json"
        with unwritten.unless(path):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, found.json())
            say(f"results: {path}")
        unwritten.tell()
        print(json.dumps(dict(step=run.step, results=found.line())), flush=True)

    on_process_zero(finish)
    run.checkpoints.close()
