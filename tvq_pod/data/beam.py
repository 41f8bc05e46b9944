"""Writing the parts of a store on the workers of an Apache Beam pipeline: --mode=prepare --runner=DataflowRunner.

This process cuts the corpus and writes the index, as it does without Beam; the workers count lines and write parts. A
runner may run the same work twice, even at the same time. So a part for a bucket is written to the worker's own disk,
and then its files, which are the same on every worker, are copied, store.json last.

An error that the user can correct is written to a file beside the parts, and the remaining parts are skipped: a runner
would only try again, and end with a traceback of its own.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import os
import pathlib
import pickle
import queue
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath
from etils.epath.backend import fsspec_backend

from tvq_pod.config.settings import Settings
from tvq_pod.data.bucket import filesystem
from tvq_pod.data.corpora import built_in_format
from tvq_pod.data.cut import count_lines, lines_before
from tvq_pod.data.part import PartTask, write_part
from tvq_pod.data.sources import File
from tvq_pod.data.store import store_path
from tvq_pod.data.vocab import Vocab
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require
from tvq_pod.host.files import replacing
from tvq_pod.host.paths import BUCKET, HUB, is_bucket
from tvq_pod.host.terminal import say

FAILED = "failed.txt"  # beside the parts: an error that the user can correct
META = "store.json"  # without it a part does not count
COPIES = 8  # files of a part that are copied at the same time
LOOK_SECONDS = 1.0  # between two checks of which parts are complete


@dataclasses.dataclass(frozen=True)
class Beam:
    """How to run a pipeline. runner: the name of a Beam runner. options: those of a pipeline's command line, except the
    runner."""

    runner: str
    options: str

    @staticmethod
    def of(runner: str | None, options: str) -> "Beam | None":
        """Returns what the two flags say. Raises UserError for options without a runner."""
        if options and not runner:
            raise UserError(
                f"--beam_options={options}: is for an Apache Beam runner; give --runner=DirectRunner or another, too"
            )
        return Beam(runner, options) if runner else None

    def check(self, settings: Settings, workdir: epath.Path) -> None:
        """Raises UserError if Beam is not installed, does not take the options, or its workers could not
        reach the corpus or the store. Reads and writes nothing."""
        require("apache_beam", f"--runner={self.runner}: Apache Beam")
        data, store = settings.data, store_path(settings, workdir)
        if data.mixture:
            raise UserError(f"--runner={self.runner}: prepares one store; leave config.data.mixture={data.mixture} out")
        if self.runner == "DataflowRunner":
            local = "workers of DataflowRunner can't reach a local path; give gs://..."
            if not is_bucket(store):
                raise UserError(f"config.data.store={store}: {local}")
            for source in [] if built_in_format(data) else data.source.split(","):
                if not _is_remote(source.strip()):
                    raise UserError(f"config.data.source={source.strip()}: {local}")
        self.pipeline()

    def pipeline(self):
        """Returns an empty apache_beam.Pipeline. Raises UserError if Beam does not take the options."""
        import apache_beam
        from apache_beam.options.pipeline_options import DirectOptions, GoogleCloudOptions, PipelineOptions
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
        from apache_beam.transforms import environments

        here, runner, said = f"--beam_options={self.options}", self.runner, io.StringIO()
        try:
            given = shlex.split(self.options)
            with contextlib.redirect_stderr(said):  # argparse prints its usage, and exits
                options = PipelineOptions(given)
                known = options.get_all_options()
                unknown = set(options.get_all_options(retain_unknown_options=True)) - set(known)
            if unknown or known["runner"]:
                name = "runner" if known["runner"] else sorted(unknown)[0]
                raise ValueError(f"{name} is not an option of Apache Beam here")
            if runner == "DataflowRunner":  # without temp_location Beam would make a bucket
                cloud = options.view_as(GoogleCloudOptions)
                needed = ("project", "region", "temp_location")
                if missing := [f"--{name}" for name in needed if not getattr(cloud, name)]:
                    raise ValueError(f"DataflowRunner needs {', '.join(missing)}")
                importlib.import_module("google.cloud.dataflow")
            if runner == "DirectRunner":  # under this name Beam would first download another runner
                runner, direct = FnApiRunner(), options.view_as(DirectOptions)
                if direct.direct_running_mode == "multi_processing":  # whose worker processes log too much
                    command = f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main"
                    of_processes = vars(environments)["SubprocessSDKEnvironment"]  # whose type is lost to a decorator
                    worker = of_processes.from_command_string(f"{command} 2>{os.devnull}")
                    runner, direct.direct_running_mode = FnApiRunner(default_environment=worker), "in_memory"
            return apache_beam.Pipeline(runner=runner, options=options)
        except ImportError:
            raise UserError(f"--runner={self.runner}: needs pip install 'apache-beam[gcp]'") from None
        except SystemExit:
            problem = said.getvalue().strip().rpartition("error: ")[2]
        except Exception as error:  # whatever the runner raises, which may look for its project or bucket
            problem = str(error).removeprefix("Pipeline has validations errors: ")
        raise UserError(f"{here}: {' '.join(problem.split())[:300]}; correct it")

    def workers(self, folder: epath.Path, vocab: Vocab, tell: Callable[[int], object]) -> "BeamWorkers":
        """Returns workers with the interface of `part_workers.Workers`, for parts in a folder."""
        return BeamWorkers(self, folder, vocab, tell)


def _is_remote(source: str) -> bool:
    is_hub = source.startswith(HUB) and not os.path.exists(source.removeprefix(HUB).partition(":")[0])
    return is_bucket(source) or is_hub


class BeamWorkers(contextlib.AbstractContextManager["BeamWorkers"]):
    """Writes the same parts as `part_workers.Workers`, through the same interface."""

    def __init__(self, beam: Beam, folder: epath.Path, vocab: Vocab, tell: Callable[[int], object]):
        """tell: is called now and then with the bytes of the parts written since its last call. Parts in a bucket are
        not counted."""
        self._beam, self._vocab, self._tell, self._failed = beam, vocab, tell, folder / FAILED

    def __exit__(self, *error) -> None:
        self._failed.unlink(missing_ok=True)

    def write(self, tasks: list[PartTask], spans: list[File]) -> None:
        """Counts the lines of spans, then writes parts. Raises what one of them raises, as a UserError."""
        if not tasks:
            return
        say(f"  {len(tasks):,} parts are written by {self._beam.runner}")
        began, waiting = time.monotonic(), [task for task in tasks if not is_bucket(task.folder)]
        with _ended(lambda: self._run(tasks, spans)) as ended:
            while True:
                with contextlib.suppress(queue.Empty):
                    error = ended.get(timeout=LOOK_SECONDS)
                    break
                done = [task for task in waiting if os.path.exists(f"{task.folder}/{META}")]
                waiting = [task for task in waiting if task not in done]
                self._tell(sum(task.n_bytes for task in done))
        if is_bucket(self._failed):
            fsspec_backend.fs(self._failed).invalidate_cache()  # its listing is older than what the workers wrote
        if said := _said(self._failed):
            raise UserError(said)
        if error:  # a runner's error has pages of tracebacks
            last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
            raise UserError(
                f"--runner={self._beam.runner}: the pipeline failed after {time.monotonic() - began:.0f} s "
                f"({last[0][:300]}); give the same command again to continue"
            ) from error

    def _run(self, tasks: list[PartTask], spans: list[File]) -> None:
        import apache_beam as beam
        from apache_beam.pvalue import AsList
        from apache_beam.runners.runner import PipelineState

        pipeline, failed = self._beam.pipeline(), str(self._failed)
        counted = (
            pipeline
            | "Spans" >> beam.Create(list(map(pickle.dumps, spans)))
            | "Spread spans" >> beam.Reshuffle()
            | "Count lines" >> beam.Map(_count, failed)
        )
        _ = (
            pipeline
            | "Parts" >> beam.Create(list(map(pickle.dumps, tasks)))
            | "Spread parts" >> beam.Reshuffle()  # so each is a bundle of its own
            | "Write parts" >> beam.Map(_write, pickle.dumps(self._vocab), failed, AsList(counted))
        )
        result = pipeline.run()
        if job_id := getattr(result, "job_id", None):
            say(f"  its job is {job_id()}")
        state = result.wait_until_finish()
        if state != PipelineState.DONE:
            raise RuntimeError(f"it has ended as {state}")


@contextlib.contextmanager
def _ended(run: Callable[[], None]) -> Iterator[queue.SimpleQueue]:
    """Calls a function in a thread. Yields a queue, which gets None when the call returns, or the exception that it
    raises. When a worker process of DirectRunner is killed, Beam waits for it forever, and only one of Beam's threads
    raises an error: that error goes into the queue, too.
    """
    ended, hook = queue.SimpleQueue(), threading.excepthook

    def call() -> None:
        try:
            run()
            ended.put(None)
        except Exception as error:
            ended.put(error)

    def heard(last) -> None:
        if isinstance(last.exc_value, RuntimeError):
            ended.put(last.exc_value)

    threading.excepthook = heard
    try:
        threading.Thread(target=call, daemon=True).start()
        yield ended
    finally:
        threading.excepthook = hook


# ------------------------------------------------- on a worker
def _count(pickled: bytes, failed: str) -> bytes:
    """Returns a part of a file with the number of its lines."""
    span, n = pickle.loads(pickled), 0
    with _kept(failed) as goes_on:
        n = count_lines(span) if goes_on else 0
    return pickle.dumps((span, n))


_vocab = functools.lru_cache(1)(pickle.loads)  # a worker writes many parts


def _write(pickled: bytes, pickled_vocab: bytes, failed: str, counted: list[bytes]) -> None:
    """Writes a part. counted: what `_count` returned for the parts of all files that are cut."""
    gc.set_threshold(100_000)  # a batch of tiny documents is many objects
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker of its own
    spans = sorted(map(pickle.loads, counted), key=lambda item: (item[0].path, item[0].begin))
    task: PartTask = pickle.loads(pickled).numbered(lines_before([span for span, _ in spans], [n for _, n in spans]))
    with _kept(failed) as goes_on:
        if goes_on and is_bucket(task.folder):
            _write_to_bucket(task, _vocab(pickled_vocab))
        elif goes_on:
            write_part(task, _vocab(pickled_vocab), _nothing)


def _write_to_bucket(task: PartTask, vocab: Vocab) -> None:
    if task.is_done(vocab):
        return
    with tempfile.TemporaryDirectory() as scratch:
        made = pathlib.Path(scratch) / "part"
        write_part(dataclasses.replace(task, folder=str(made)), vocab, _nothing)
        names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
        folder = epath.Path(task.folder)

        def copy(name: str) -> None:
            (folder / name).write_bytes((made / name).read_bytes())

        with contextlib.suppress(FileNotFoundError):
            if (folder / META).read_bytes() != (made / META).read_bytes():  # of other files
                (folder / META).unlink(missing_ok=True)
        with concurrent.futures.ThreadPoolExecutor(COPIES) as threads:
            list(threads.map(copy, names - {META}))
        there = {path.removeprefix(f"{task.folder.removeprefix(BUCKET)}/") for path in filesystem().find(task.folder)}
        for old in there - names:  # from other files, or from a process that wrote in place
            (folder / old).unlink(missing_ok=True)
        copy(META)


def _nothing(n_bytes: int) -> None:
    """Ignores the progress of a part."""


@contextlib.contextmanager
def _kept(failed: str) -> Iterator[bool]:
    """Writes an error that the user can correct to a file. Yields whether there is none yet."""
    path = epath.Path(failed)
    try:
        yield not _said(path)
    except UserError as error:
        if is_bucket(path):
            path.write_text(str(error))
        else:
            with replacing(path, by_many=True) as draft:
                draft.write_text(str(error))


def _said(failed: epath.Path) -> str:
    """Returns the error in the file, or ""."""
    try:
        return failed.read_text()
    except FileNotFoundError:
        return ""
