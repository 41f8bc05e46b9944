"""Building a store of several parts: workers write parts side by side, then the index is written.

A part is complete when it has its name (in a bucket: its store.json). A prepare that resumes after a kill keeps the
complete parts of the same files, and writes the others. The store is complete when it has its index.
"""

import hashlib
import json
import os
import re

from etils import epath

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.arrays import named_errors
from tvq_pod.data.beam import FAILED, Beam
from tvq_pod.data.build import progress_bar
from tvq_pod.data.checked import PROBES, Checked, Report, probe
from tvq_pod.data.corpora import blocks_of
from tvq_pod.data.cut import signature, size_of, spans_of
from tvq_pod.data.part import PartTask
from tvq_pod.data.part_workers import Workers
from tvq_pod.data.place import adopted, check_free, followed
from tvq_pod.data.sources import File, Listing
from tvq_pod.data.store import PARTED, SPLITS, TokenStore, crc32c_of, made_with, totals
from tvq_pod.data.vocab import Vocab, keep_vocab
from tvq_pod.data.writer import check_documents
from tvq_pod.host.files import write_whole
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say
from tvq_pod.parallel.deadlines import still_working

PART = re.compile(r"part-\d{5,}(\.preparing|\.lock)?")
PROGRESS = "progress.json"  # marks a folder as an unfinished store of ours


def make_parts(
    path: epath.PathLike,
    parts: list[list[File]],
    listing: Listing,
    vocab: Vocab,
    data: DataSettings,
    beam: Beam | None = None,
) -> TokenStore:
    """Writes a store of these parts of a listing's files (see cut.py); resumes where another process was interrupted.

    beam: the workers that write the parts; None: processes of this machine.

    Raises UserError if there is something else at `path`, or no document is left to train on.
    """
    settings = made_with(data)
    if store := adopted(path, vocab, settings):
        return store
    check_free(path)
    path = followed(path)
    in_place = is_bucket(path) or os.path.ismount(path)
    draft = path if in_place else path.with_name(f"{path.name}.preparing")
    identity = dict(vocab=vocab.name, n_vocab=vocab.n_vocab, made_with=settings)
    begin(draft, identity, keeps_folder=in_place)
    written = write_parts(draft, 0, parts, listing, vocab, data, beam)
    parts_written = [part_entry(draft, folder) for folder in written]
    own_splits = all(TokenStore(draft / folder).meta["own_splits"] for folder in written)
    check_documents(totals(parts_written), settings, own_splits)
    about = dict(made_with=settings, own_splits=own_splits, holdout=listing.holdout, before=[], added=[])
    write_index(draft, parts_written, vocab, about)
    with named_errors():
        if draft != path:
            os.rename(draft, path)  # onto an empty folder, too
        (path / PROGRESS).unlink(missing_ok=True)
    return TokenStore(path)


def begin(draft: epath.Path, identity: dict, keeps_folder: bool) -> None:
    """Makes the folder that a store grows in, or keeps what a killed process left there; parts of a store with other
    settings are removed. keeps_folder: whether the folder itself must stay."""
    content = json.dumps(dict(identity=identity, crc32c=crc32c_of(identity)))
    with named_errors():
        try:
            if (draft / PROGRESS).read_text() == content:
                return
            say(f"{draft} was begun with other settings, or is damaged; starting over")
        except FileNotFoundError:
            pass
        if draft.exists() and not keeps_folder:
            draft.rmtree()
        for old in draft.iterdir() if draft.exists() else ():
            if old.name in SPLITS or PART.fullmatch(old.name):
                old.rmtree()
        draft.mkdir(parents=True, exist_ok=True)
        write_whole(draft / PROGRESS, content, sync=True)


def write_parts(
    folder: epath.Path,
    first: int,
    parts: list[list[File]],
    listing: Listing,
    vocab: Vocab,
    data: DataSettings,
    beam: Beam | None = None,
) -> list[str]:
    """Writes the missing parts, numbered from `first`. Returns the names of the folders of all parts.

    beam: see `make_parts`.
    """
    n_processes = data.prepare_processes or len(os.sched_getaffinity(0))
    with progress_bar() as bar:

        def tell(n_bytes: int) -> None:
            still_working()
            bar.update(n_bytes)

        with beam.workers(folder, vocab, tell) if beam else Workers(n_processes, vocab, tell) as workers:
            names = [f"part-{first + number:05d}" for number in range(len(parts))]
            tasks = [
                PartTask.of(folder / name, files, signature(files), listing, data, sum(map(_bytes_of, files)))
                for name, files in zip(names, parts, strict=True)
            ]
            _remove_others(folder, first, names)
            left = [task for task in tasks if not task.is_done(vocab)]
            if len(left) < len(tasks):
                say(f"  resumes: {len(tasks) - len(left)} of {len(tasks)} parts are complete")
            if left and not vocab.takes_any_bytes:
                _probe(tasks[0], vocab, data)
            bar.total = sum(task.n_bytes for task in left)
            are_cut = {file.path for task in left for file in task.listing.files if file.begin}
            workers.write(left, [span for span in spans_of(parts, listing.format) if span.path in are_cut])
    report = Report()
    for name in names:
        report.add(json.loads((folder / name / "store.json").read_text())["report"])
    report.say(vocab, data)
    return names


def _probe(task: PartTask, vocab: Vocab, data: DataSettings) -> None:
    """Warns of a vocabulary that changes the text of the first documents."""
    n_probes = PROBES
    for batch in Checked(blocks_of(task.listing, data), vocab, data, counts=False):
        if not (n_probes := probe(batch, vocab, n_probes)):
            break


def _bytes_of(file: File) -> int:
    return size_of(file) if file.end is None else file.end - file.begin


def _remove_others(folder: epath.Path, first: int, names: list[str]) -> None:
    """Parts of a corpus that was another when a process before began with it; parts below `first` are the store's."""
    with named_errors():
        for path in folder.iterdir():
            if PART.fullmatch(path.name) and int(path.name[5:].split(".")[0]) >= first and path.name not in names:
                path.rmtree() if path.is_dir() else path.unlink(missing_ok=True)
        (folder / FAILED).unlink(missing_ok=True)


# ------------------------------------------------- the index
def part_entry(path: epath.Path, folder: str) -> dict:
    """Of a part that was written, for store.json of all. Raises UserError if it is damaged."""
    meta = TokenStore(path / folder).meta
    names = ("fingerprint", "splits", "arrays")
    return dict(folder=folder, **{name: meta[name] for name in names}, crc32c=meta["crc32c"])


def write_index(path: epath.Path, parts: list[dict], vocab: Vocab, about: dict) -> None:
    """Writes store.json of a store of several parts, in place of the one that is there. about: what else is in it:
    made_with, own_splits and holdout; before, the fingerprints of the store before it was added to, and how many parts
    it had then; added, what each addition was made with."""
    contents = [PARTED, vocab.name, [part["fingerprint"] for part in parts]]
    meta = dict(
        format=PARTED,
        vocab=vocab.name,
        n_vocab=vocab.n_vocab,
        fingerprint=hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
        splits=totals(parts),
        parts=parts,
        **about,
    )
    meta["crc32c"] = crc32c_of(meta)
    with named_errors():
        keep_vocab(vocab, path)
        write_whole(path / "store.json", json.dumps(meta) + "\n", sync=True)
