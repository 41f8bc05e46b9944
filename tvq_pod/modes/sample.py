"""--mode=sample: sampling text or images from a checkpoint."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from etils import epath

from tvq_pod.config.identity import model_record
from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.settings import MeshSettings, Settings
from tvq_pod.data.open import run_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.bucket_file import BucketFile
from tvq_pod.host.new_file import NewFile
from tvq_pod.host.paths import is_bucket
from tvq_pod.inference import images
from tvq_pod.inference.json_lines import sampled_lines
from tvq_pod.inference.prompts import Prompt, from_json, given_prompt, is_json_lines, read_prompts, to_json
from tvq_pod.inference.text import continuations
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.processes import is_process_zero, on_process_zero, text_from_process_zero
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.training.step import abstract_train_state

T = TypeVar("T")
UPLOAD_SECONDS = 600.0  # the time that a bucket has to take the last lines


def sample(
    settings: Settings,
    workdir: epath.Path,
    prompts: list[bytes],
    step: int | None,
    prompt_file: str | None = None,
    output: str | None = None,
) -> None:
    """Continues each prompt (or config.sample.prompt) with a checkpoint of the run in `workdir`, config.sample.count
    times; a model of images draws config.sample.count images.

    prompt_file: a file with one more prompt or, if it is FILE.jsonl, with many. With FILE.jsonl, or with `output`, a
    new file, samples are written as JSON lines; otherwise as text to stdout. Rows are split over all devices of all
    processes; process 0 reads the prompts and writes. A single process shows the first row's text as it is drawn;
    several show it when all rows have ended.
    """
    images.check_packages(settings)
    as_json = output is not None or is_json_lines(prompt_file)
    _check(settings, as_json, output)
    given = _prompts(prompts, prompt_file) or [given_prompt(settings.sample.prompt.encode())]
    checkpoints = CheckpointReader(workdir, settings.checkpoint.restore_timeout_seconds)
    step = checkpoints.pick(step)
    vocab = run_vocab(settings, workdir)
    checkpoints.check(step, model_record(settings, vocab.name))
    check_vocab_fits(settings, vocab.n_vocab)
    alone, count = jax.process_count() == 1, settings.sample.count
    n_rows = count if images.are_images(settings) else count * len(given)
    settings = dataclasses.replace(settings, mesh=MeshSettings(slices=1 if alone else settings.mesh.slices))
    mesh = make_mesh(settings.mesh, jax.local_devices()[:n_rows] if alone else None)
    abstract = abstract_train_state(settings, mesh).params
    params = checkpoints.restore_params(step, abstract, settings.eval.weights)
    devices = list(mesh.devices.flat)
    if images.are_images(settings):
        drawn = images.draw_images(params, settings.model, settings.sample, devices)
        on_process_zero(lambda: images.write_samples(drawn, workdir, step))
    elif as_json:
        lines = sampled_lines(params, settings.model, vocab, settings.sample, given, devices)
        with _writer(output) as write:
            for line in lines:
                on_process_zero(functools.partial(write, line))
    else:
        rows = [prompt.text for prompt in given for _ in range(count)]
        texts = continuations(params, settings.model, vocab, settings.sample, rows, devices)
        if not alone:
            texts = [list(pieces) for pieces in texts]
        on_process_zero(lambda: _show(texts))
    checkpoints.close()


def _check(settings: Settings, as_json: bool, output: str | None) -> None:
    """Raises UserError for settings that would be ignored, and files that would be replaced."""
    if as_json and images.are_images(settings):
        named = f"--output={output}" if output else "--prompt_file"
        raise UserError(f"{named}: is for text; leave it out with config.data.format=imagenet64")
    if settings.sample.logprobs and not as_json:
        raise UserError(
            "config.sample.logprobs=True: text has no place for them; give --output=FILE, or --prompt_file=FILE.jsonl"
        )
    if output is not None:
        on_process_zero(lambda: _check_new(output))


def _check_new(output: str) -> None:
    path = epath.Path(output)
    try:
        if path.exists():
            raise UserError(f"--output={output}: already exists, and is not replaced; give a new file")
        if not is_bucket(output) and not path.parent.is_dir():
            raise UserError(f"--output={output}: the folder {path.parent} does not exist; make it first")
    except OSError as error:
        raise UserError(f"--output={output}: can't be written ({error.strerror}); give another file") from None


def _prompts(prompts: list[bytes], prompt_file: str | None) -> list[Prompt]:
    """Returns the prompts on process 0's command line and in its file."""
    found = [given_prompt(prompt) for prompt in prompts]
    if prompt_file is not None:
        on_process_zero(lambda: found.extend(read_prompts(prompt_file)))
    return from_json(text_from_process_zero(to_json(found)))


@contextlib.contextmanager
def _writer(output: str | None) -> Iterator[Callable[[str], None]]:
    """Yields a function by which process 0 writes a line of samples. All processes must enter the context. Raises
    UserError if the file can't be written."""
    opened: list[NewFile] = []
    if output is not None and not is_bucket(output):
        on_process_zero(lambda: opened.append(_as_user_error(output, lambda: NewFile(output))))  # all end if it fails
    if output is None or not is_process_zero():
        yield functools.partial(print, flush=True)
    elif is_bucket(output):
        file = BucketFile(epath.Path(output))
        yield lambda line: file.write(f"{line}\n".encode())
        if not file.flush(UPLOAD_SECONDS):
            raise UserError(f"--output={output}: the bucket did not take all lines in {UPLOAD_SECONDS:.0f} seconds")
        file.close()
    else:
        with contextlib.closing(opened[0]) as file:
            yield lambda line: _as_user_error(output, lambda: file.write_line(line))
            _as_user_error(output, file.finish)


def _as_user_error(output: str, write: Callable[[], T]) -> T:
    try:
        return write()
    except BlockingIOError:
        raise UserError(f"--output={output}: another process writes it now; give another file") from None
    except OSError as error:
        raise UserError(f"--output={output}: can't be written ({error.strerror}); give another file") from None


def _show(texts) -> None:
    for index, pieces in enumerate(texts):
        if index:
            print("\n" + "-" * 80)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
