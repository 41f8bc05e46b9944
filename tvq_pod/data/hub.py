"""Corpora read by Hugging Face's `datasets`, hf:NAME_OR_FOLDER, as streams of Arrow record batches."""

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

SAVED = ("dataset_dict.json", "state.json")  # in a folder written by save_to_disk
BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which the same request may succeed
REMEDY = "give hf:NAME of a dataset, or hf:FOLDER"
ROWS = 256  # per batch


class Name(NamedTuple):
    """The parts of hf:NAME[:CONFIG]:SPLIT; split is "" for all splits."""

    dataset: str
    config: str
    split: str

    def __str__(self) -> str:
        parts = [self.dataset, *([self.config] if self.config else []), self.split]
        return HUB + ":".join(parts)

    @property
    def folder(self) -> str | None:
        """The folder on this machine, if the name is one."""
        return self.dataset if os.path.isdir(self.dataset) else None


def is_hub(source: str) -> bool:
    """Returns whether a source begins with hf:."""
    return source.startswith(HUB)


def parse(source: str) -> Name:
    """Parses a source. Raises UserError unless it is hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."""
    rest = source.removeprefix(HUB)
    if os.path.isdir(rest):
        return Name(rest, "", "")
    dataset, *more = rest.split(":")
    if not dataset or len(more) > 2:
        raise UserError(
            f"config.data.source={source}: must be hf:NAME_OR_FOLDER, optionally followed by :SPLIT or :CONFIG:SPLIT"
        )
    return Name(dataset, more[0] if len(more) == 2 else "", more[-1] if more else "")


def absolute(source: str) -> str:
    """Returns a source with the absolute path if it names a folder on this machine."""
    name = parse(source)
    return str(name._replace(dataset=os.path.abspath(name.dataset))) if name.folder else source


def splits_of(name: Name) -> list[str]:
    """Returns the splits of a dataset, in its own order, or the one that the name asks for. Raises UserError if the
    dataset or split does not exist or can't be read."""
    there = list(_loaded(name.dataset, name.config))
    if not name.split:
        return there
    if name.split not in there:
        raise UserError(f"config.data.source={name}: this split does not exist; give one of {', '.join(there)}")
    return [name.split]


def batches(name: Name) -> Iterator[Any]:
    """Yields a split's rows as pyarrow record batches of at most ROWS rows. Raises UserError if it can't be read."""
    split = _loaded(name.dataset, name.config)[name.split]
    with _named(str(name)):
        for table in split.with_format("arrow").iter(batch_size=ROWS):
            yield from table.to_batches()


@functools.lru_cache(8)
def _loaded(dataset: str, config: str) -> dict[str, Any]:
    """Returns iterable datasets by split."""
    source = HUB + dataset + (f":{config}:" if config else "")
    require("datasets", f"config.data.source={source}: a Hugging Face dataset")
    with _named(source):
        return retried(source, lambda: _load(dataset, config), _may_pass, REMEDY)


def _load(dataset: str, config: str) -> dict[str, Any]:
    import datasets

    for library in ("datasets", "huggingface_hub"):  # they log a line per try; their exceptions say as much
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if any(os.path.exists(os.path.join(dataset, name)) for name in SAVED):
        saved = datasets.load_from_disk(dataset)
        splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        return {str(name): split.to_iterable_dataset() for name, split in splits.items()}
    try:
        found = datasets.load_dataset(dataset, config or None, streaming=True)
    except FileNotFoundError as error:  # `retried` would pass it on
        raise ValueError(error) from None
    return {str(name): split for name, split in found.items()}


def _may_pass(error: Exception) -> bool:
    from datasets.config import HF_HUB_OFFLINE

    status = getattr(getattr(error, "response", None), "status_code", None)  # of an HTTP error
    is_network = isinstance(error, (ConnectionError, TimeoutError)) or status in BUSY
    return is_network and not HF_HUB_OFFLINE


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Turns what the library raises inside the block into a UserError that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its readers raise many kinds
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"config.data.source={source}: can't be read ({why}); {REMEDY}") from None
