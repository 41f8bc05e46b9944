"""Adding new files of a corpus to an existing store, as new parts; the old parts stay as they are."""

import dataclasses
import json
import os

from etils import epath

from tvq_pod.config.settings import DataSettings, Settings
from tvq_pod.data.beam import Beam
from tvq_pod.data.build_parts import part_entry, write_index, write_parts
from tvq_pod.data.corpora import files_of
from tvq_pod.data.cut import address_of, as_text, cut, size_of
from tvq_pod.data.open import check_made_with, check_outside
from tvq_pod.data.place import followed, only_one
from tvq_pod.data.sources import File
from tvq_pod.data.store import FILES, TokenStore, made_with, store_path
from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket
from tvq_pod.host.terminal import say

SAME = ("validation_share", "test_share", "invalid_utf8")  # settings that must match the store's


def append(settings: Settings, workdir: epath.Path, beam: Beam | None = None) -> TokenStore:
    """Adds the files of config.data.source that the store does not have. Resumes where an earlier process was killed.

    beam: the workers that write the new parts; None: processes of this machine.
    Raises UserError if the store does not exist, one of its files has changed, or the settings do not fit it.
    """
    data, path = settings.data, store_path(settings, workdir)
    if data.mixture:
        raise UserError(f"config.data.mixture={data.mixture}: --append adds to one store; leave the mixture out")
    if not TokenStore.exists(path):
        raise UserError(f"config.data.store={path}: does not exist, and --append adds to a store; leave it out")
    check_outside(settings, workdir)
    with only_one(path):
        path = followed(path)
        store = TokenStore(path)
        made = {name: value for name, value in store.meta["made_with"].items() if name in SAME}
        check_made_with(data, store, made)
        found = files_of(data)
        if found is None:
            raise UserError(f"config.data.source={data.source}: --append adds files, and this corpus has none")
        held_out = store.meta.get("holdout", "names" if store.meta.get("own_splits") else "hash")
        if found.holdout != held_out:
            raise UserError(
                f"config.data.holdout={data.holdout}: means {found.holdout} for {data.source}, but the documents of "
                f"{path} are held out by {held_out}; give config.data.holdout={held_out}, or another config.data.store"
            )
        new = _new_files(store, found.files, data)
        if not new:
            say(f"{path}: already has all {len(found.files):,} files of {data.source}; nothing is added")
            return store
        say(f"adding {len(new):,} of {len(found.files):,} files of {data.source} to {path}, as {found.format}")
        found = dataclasses.replace(found, files=new)
        for line in found.lines():
            say(line)
        vocab, old = store.vocab(), _entries(store)
        names = write_parts(path, len(old), cut(found), found, vocab, data, beam)
        meta = store.meta
        about = dict(
            made_with=meta["made_with"],
            counts_words=meta.get("counts_words", False),
            own_splits=meta.get("own_splits", False)
            and all(TokenStore(path / name).meta["own_splits"] for name in names),
            holdout=held_out,
            before=store.versions,
            added=[*meta.get("added", []), made_with(data)],
        )
        write_index(path, [*old, *(part_entry(path, name) for name in names)], vocab, about)
    store = TokenStore(path)
    (was, _), now = about["before"][-1], store.fingerprint
    say(
        f"added {len(names)} parts: the fingerprint is {now[:16]} now, and was {was[:16]}; runs that began before "
        "continue with the parts that they began with, unless config.train.on_data_change=restart_streams"
    )
    return store


def _entries(store: TokenStore) -> list[dict]:
    return [dataclasses.asdict(part) for part in store.parts]


def _new_files(store: TokenStore, files: list[File], data: DataSettings) -> list[File]:
    """Returns the files that the store does not have, and says which files it takes for files that the store read from
    another place. Raises UserError if a file has changed since the store read it."""
    known = _files_of(store, data)
    paths = {entry["path"]: entry["size"] for entry in known}
    names = {(entry["name"], entry["size"]) for entry in known}  # the corpus may have moved
    new, moved = [], []
    for file in files:
        size, path, name = size_of(file), as_text(address_of(file)), as_text(file.name)
        if paths.get(path, size) != size:
            raise UserError(
                f"config.data.source={data.source}: {file.name} had {paths[path]:,} bytes when {store.path} read "
                f"it, and has {size:,} now; --append adds only new files; put new text into a file of its own"
            )
        if path not in paths:
            (moved if file.kind != "hf" and (name, size) in names else new).append(file)
    if moved:
        first = ", ".join(file.path for file in moved[:3])
        say(
            f"{len(moved):,} files have the name and size of files that {store.path} read from another place, and "
            f"are skipped as the same ({first}{', ...' if len(moved) > 3 else ''}); a new file needs another name"
        )
    return new


def _files_of(store: TokenStore, data: DataSettings) -> list[dict]:
    """The entries of the store's files, as `signature` wrote them."""
    known = []
    for part in store.parts:
        path = store.path / part.folder / FILES
        try:
            known += json.loads(path.read_text())
        except FileNotFoundError:
            if part.crc32c is not None:
                raise UserError(f"config.data.store={store.path}: {path} is missing, so the store is damaged") from None
            if _places(store.meta["made_with"].get("source", "")) & _places(data.source):
                raise UserError(
                    f"config.data.source={data.source}: an older version made {store.path} from it, and did not record "
                    "which files it read; give only the new files, by a glob or in a folder of their own"
                ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"config.data.store={store.path}: {path} is damaged ({str(error)[:100]})") from None
    return known


def _places(source: str) -> set[str]:
    """The real locations of a source's paths."""
    return {place if is_bucket(place) else os.path.realpath(place) for place in source.split(",") if place}
