"""Writing the parts of a store on the workers of an Apache Beam pipeline: --mode=prepare --runner=DataflowRunner.

This process cuts the corpus and writes the index, as it does without Beam; the workers count lines and write parts. A
runner may run the same work twice, at the same time, too. So a part for a bucket is written on the worker's own disk,
and then its files, which are the same whoever makes them, are copied, store.json last.

An error that the user can correct is kept in a file beside the parts, and the parts that are left are passed over:
a runner would only try again, and end with a page of its own.
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

FAILED = "failed.txt"  # beside the parts: what the user can correct
META = "store.json"  # without it a part is not there
COPIES = 8  # files of a part that are copied at the same time
LOOK_SECONDS = 1.0  # between two looks at which parts are there


@dataclasses.dataclass(frozen=True)
class Beam:
    """runner: the name of one of Beam's. options: as on the command line of a pipeline, but for the runner."""

    runner: str
    options: str

    @staticmethod
    def of(runner: str | None, options: str) -> "Beam | None":
        """What two flags say. Raises UserError if there is no runner for the options."""
        if options and not runner:
            raise UserError(
                f"--beam_options={options}: is for a runner of Apache Beam; give --runner=DirectRunner or another, too"
            )
        return Beam(runner, options) if runner else None

    def check(self, settings: Settings, workdir: epath.Path) -> None:
        """Raises UserError if Beam is not installed, does not take the options, or its workers could reach neither
        corpus nor store. Reads and writes nothing."""
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
        """An empty apache_beam.Pipeline. Raises UserError if Beam does not take the options."""
        import apache_beam
        from apache_beam.options.pipeline_options import DirectOptions, GoogleCloudOptions, PipelineOptions
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
        from apache_beam.transforms import environments

        here, runner, said = f"--beam_options={self.options}", self.runner, io.StringIO()
        try:
            given = shlex.split(self.options)
            with contextlib.redirect_stderr(said):  # argparse prints how everything is used, and exits
                options = PipelineOptions(given)
                known = options.get_all_options()
                unknown = set(options.get_all_options(retain_unknown_options=True)) - set(known)
            if unknown or known["runner"]:
                name = "runner" if known["runner"] else sorted(unknown)[0]
                raise ValueError(f"{name} is not an option of Apache Beam here")
            if runner == "DataflowRunner":  # Beam would go and make a bucket
                cloud = options.view_as(GoogleCloudOptions)
                needed = ("project", "region", "temp_location")
                if missing := [f"--{name}" for name in needed if not getattr(cloud, name)]:
                    raise ValueError(f"DataflowRunner needs {', '.join(missing)}")
                importlib.import_module("google.cloud.dataflow")
            if runner == "DirectRunner":  # by this name, Beam would first fetch another runner from the internet
                runner, direct = FnApiRunner(), options.view_as(DirectOptions)
                if direct.direct_running_mode == "multi_processing":  # processes that log what nobody needs to read
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
        """As `part_workers.Workers`, for parts in a folder."""
        return BeamWorkers(self, folder, vocab, tell)


def _is_remote(source: str) -> bool:
    is_hub = source.startswith(HUB) and not os.path.exists(source.removeprefix(HUB).partition(":")[0])
    return is_bucket(source) or is_hub


class BeamWorkers(contextlib.AbstractContextManager["BeamWorkers"]):
    """Has what `part_workers.Workers` has. What it writes is the same."""

    def __init__(self, beam: Beam, folder: epath.Path, vocab: Vocab, tell: Callable[[int], object]):
        """tell: is called as they get on, with the bytes of the parts that were written since it was called last, as
        far as that is known: parts in a bucket are not looked for."""
        self._beam, self._vocab, self._tell, self._failed = beam, vocab, tell, folder / FAILED

    def __exit__(self, *error) -> None:
        self._failed.unlink(missing_ok=True)

    def write(self, tasks: list[PartTask], spans: list[File]) -> None:
        """Writes parts, and counts the lines of spans before. Raises what one of them raises, as a UserError."""
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
            fsspec_backend.fs(self._failed).invalidate_cache()  # what is listed there is from before the workers wrote
        if said := _said(self._failed):
            raise UserError(said)
        if error:  # a runner's has pages of where it was raised
            last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
            raise UserError(
                f"--runner={self._beam.runner}: the pipeline has failed after {time.monotonic() - began:.0f} s "
                f"({last[0][:300]}); start again to go on with the parts that are written"
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
            | "Spread parts" >> beam.Reshuffle()  # each is then a bundle of its own
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
    """Calls a function in a thread. Gives a queue, which gets None when the call has returned, or what it raises. When
    a worker process of DirectRunner is killed, Beam waits for it for ever: a thread's last words are in the queue, too.
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
    """How many lines there are in a part of a file, with the part."""
    span, n = pickle.loads(pickled), 0
    with _kept(failed) as goes_on:
        n = count_lines(span) if goes_on else 0
    return pickle.dumps((span, n))


_vocab = functools.lru_cache(1)(pickle.loads)  # a worker writes many parts


def _write(pickled: bytes, pickled_vocab: bytes, failed: str, counted: list[bytes]) -> None:
    """Writes a part. counted: what `_count` returned of the parts of all files that are cut."""
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
            if (folder / META).read_bytes() != (made / META).read_bytes():  # of other files, and not of the same work
                (folder / META).unlink(missing_ok=True)
        with concurrent.futures.ThreadPoolExecutor(COPIES) as threads:
            list(threads.map(copy, names - {META}))
        there = {path.removeprefix(f"{task.folder.removeprefix(BUCKET)}/") for path in filesystem().find(task.folder)}
        for old in there - names:  # of other files, or of a process that wrote in place
            (folder / old).unlink(missing_ok=True)
        copy(META)


def _nothing(n_bytes: int) -> None:
    """Nobody is told."""


@contextlib.contextmanager
def _kept(failed: str) -> Iterator[bool]:
    """What the user can correct is kept in a file. Gives whether there is none yet."""
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
    """What is kept; "" if nothing is."""
    try:
        return failed.read_text()
    except FileNotFoundError:
        return ""
