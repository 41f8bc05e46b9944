"""Corpora that Hugging Face's `datasets` reads, hf:NAME_OR_FOLDER, as streams of Arrow record batches."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from tvq_pod.data.retry import retried
from tvq_pod.errors import UserError
from tvq_pod.host.extras import require
from tvq_pod.host.paths import HUB

SAVED = ("dataset_dict.json", "state.json")  # of a folder that save_to_disk has written
BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers of HTTP after which the same request may succeed
REMEDY = "give hf:NAME of a dataset, or hf:FOLDER"
ROWS = 256  # of a batch


class Name(NamedTuple):
    """What hf:NAME[:CONFIG]:SPLIT says; split is "" for all splits."""

    dataset: str
    config: str
    split: str

    def __str__(self) -> str:
        parts = [self.dataset, *([self.config] if self.config else []), self.split]
        return HUB + ":".join(parts)

    @property
    def folder(self) -> str | None:
        """The folder on this machine that it is, if it is one."""
        return self.dataset if os.path.isdir(self.dataset) else None


def is_hub(source: str) -> bool:
    """Whether a source is one of these."""
    return source.startswith(HUB)


def parse(source: str) -> Name:
    """Raises UserError for what is not hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."""
    rest = source.removeprefix(HUB)
    if os.path.isdir(rest):
        return Name(rest, "", "")
    dataset, *more = rest.split(":")
    if not dataset or len(more) > 2:
        raise UserError(
            f"config.data.source={source}: must be hf:NAME_OR_FOLDER, with :SPLIT or :CONFIG:SPLIT after it if need be"
        )
    return Name(dataset, more[0] if len(more) == 2 else "", more[-1] if more else "")


def absolute(source: str) -> str:
    """The same name, with the full path if it is of a folder on this machine."""
    name = parse(source)
    return str(name._replace(dataset=os.path.abspath(name.dataset))) if name.folder else source


def splits_of(name: Name) -> list[str]:
    """The splits of a dataset, in its own order, or the one that is asked for. Raises UserError if there is no such
    dataset or split, or it can't be read."""
    there = list(_loaded(name.dataset, name.config))
    if not name.split:
        return there
    if name.split not in there:
        raise UserError(f"config.data.source={name}: has no such split, but {', '.join(there)}; give one of these")
    return [name.split]


def batches(name: Name) -> Iterator[Any]:
    """A split's rows, as pyarrow record batches of at most ROWS rows. Raises UserError if it can't be read."""
    split = _loaded(name.dataset, name.config)[name.split]
    with _named(str(name)):
        for table in split.with_format("arrow").iter(batch_size=ROWS):
            yield from table.to_batches()


@functools.lru_cache(8)
def _loaded(dataset: str, config: str) -> dict[str, Any]:
    """Iterable datasets by their splits."""
    source = HUB + dataset + (f":{config}:" if config else "")
    require("datasets", f"config.data.source={source}: a Hugging Face dataset")
    with _named(source):
        return retried(source, lambda: _load(dataset, config), _may_pass, REMEDY)


def _load(dataset: str, config: str) -> dict[str, Any]:
    import datasets

    for library in ("datasets", "huggingface_hub"):  # a line for each try; what they raise says as much
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if any(os.path.exists(os.path.join(dataset, name)) for name in SAVED):
        saved = datasets.load_from_disk(dataset)
        splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        return {str(name): split.to_iterable_dataset() for name, split in splits.items()}
    try:
        found = datasets.load_dataset(dataset, config or None, streaming=True)
    except FileNotFoundError as error:  # it is what `retried` hands on
        raise ValueError(error) from None
    return {str(name): split for name, split in found.items()}


def _may_pass(error: Exception) -> bool:
    from datasets.config import HF_HUB_OFFLINE

    status = getattr(getattr(error, "response", None), "status_code", None)  # of an answer that is an error
    is_network = isinstance(error, (ConnectionError, TimeoutError)) or status in BUSY
    return is_network and not HF_HUB_OFFLINE


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """What the library raises in here is a UserError that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any of its readers
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"config.data.source={source}: can't be read ({why}); {REMEDY}") from None
