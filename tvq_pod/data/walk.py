"""Finding the files below a folder: those to read, and those left out, with the reason."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator

from fsspec.utils import glob_translate

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.document import Names
from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket

HIDDEN = "hidden (config.data.hidden=True includes them)"
EXCLUDED = "by config.data.exclude"
UNMATCHED = "that config.data.glob does not match"
LOST = "lost+found of a file system"
OURS = "stores or runs of this program"
NOWHERE = "broken links"
ABOVE = "links to a folder that contains them"
AGAIN = "links to folders that are already read"
SPECIAL = "neither a file nor a folder"
Id = tuple[int, int]  # a folder's device and inode on this machine


class Rules:
    """The settings that choose files by name: config.data.glob, exclude and hidden."""

    def __init__(self, data: DataSettings):
        """Raises UserError if one of them is not a glob."""
        self._hidden = data.hidden
        self._glob = None if data.glob == "**/*" else _pattern("glob", data.glob)
        excluded = [part.strip() for part in data.exclude.split(",")] if data.exclude else []
        self._paths = {part: _pattern("exclude", part.rstrip("/")) for part in excluded if "/" in part}
        self._names = {part: _pattern("exclude", part) for part in excluded if "/" not in part}
        self.unused = dict.fromkeys(excluded)  # patterns of config.data.exclude without a match so far

    def left_out(self, path: str, name: str) -> str | None:
        """Returns why a file or folder is left out with its content, or None. path: relative to the source. name: its
        last part."""
        if name.startswith(".") and not self._hidden:
            return HIDDEN
        if name == "lost+found":
            return LOST
        return EXCLUDED if self.excludes(path, name) else None

    def excludes(self, path: str, name: str) -> bool:
        """Returns whether config.data.exclude leaves a file or folder out. path, name: as in `left_out`."""
        for patterns, text in ((self._names, name), (self._paths, path)):
            for part, pattern in patterns.items():
                if pattern.match(text):
                    self.unused.pop(part, None)
                    return True
        return False

    def matches(self, path: str) -> bool:
        """Returns whether config.data.glob matches a file."""
        return self._glob is None or self._glob.match(path) is not None


def _pattern(setting: str, glob: str) -> re.Pattern:
    try:
        if not glob or glob.startswith("/") or ".." in glob.split("/"):
            raise ValueError("it must be relative to the source, and not empty")
        return re.compile(glob_translate(glob))
    except (ValueError, re.error) as error:
        takes = "; '**/*' takes all files" if setting == "glob" else ", as **/*.log or drafts/*"
        raise UserError(f"config.data.{setting}={glob}: is not a pattern ({error}){takes}") from None


@dataclasses.dataclass
class Walk:
    """The result of a walk. files: paths relative to the folder, in order. left_out: names of files and folders, by
    reason. folders: the paths of the folders that were read, relative to the folder, by their device and inode."""

    root: str
    files: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, Names] = dataclasses.field(default_factory=dict)
    folders: dict[Id, str] = dataclasses.field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        """Counts a file or folder that is left out."""
        self.left_out.setdefault(reason, Names()).add(name)


def walk(root: str, rules: Rules) -> Walk:
    """Finds all files below a folder, following links to folders, but reads no folder twice. Raises UserError if a
    folder can't be read, since its files would be missing."""
    found = Walk(root)
    with _unreadable(root):
        own = os.stat(root)
    above = {_id_of(os.stat(parent)) for parent in pathlib.Path(os.path.realpath(root)).parents}
    found.folders[_id_of(own)] = ""
    links: list[str] = []
    _walk_folder(found, rules, "", links)
    while links:  # after all real folders, so that a folder reached in two ways has its real name
        links.sort(key=parts_of, reverse=True)
        path = links.pop()
        with _unreadable(os.path.join(root, path)):
            target = _id_of(os.stat(os.path.join(root, path)))
        if target in above or target == _id_of(own):
            found.leave_out(ABOVE, path)
        elif target in found.folders:
            found.leave_out(AGAIN, path)
        else:
            found.folders[target] = path
            _walk_folder(found, rules, path, links)
    found.files.sort(key=parts_of)
    return found


def walk_nothing(root: str) -> Walk:
    """Returns a Walk without files, for `place_of`: another library reads them. Raises UserError as `walk` does."""
    with _unreadable(root):
        return Walk(root, folders={_id_of(os.stat(root)): ""})


def walk_names(root: str, names: Iterable[str], rules: Rules) -> Walk:
    """`walk` for a folder in a bucket, where folders are only parts of names. names: those of its objects, relative to
    the folder."""
    found = Walk(root)
    files = {tuple(parts_of(name)) for name in names}
    inside: dict[tuple[str, ...], set[str]] = {}  # the names in each folder
    for parts in files:
        for n in range(len(parts)):
            inside.setdefault(parts[:n], set()).add(parts[n])
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        folder = waiting.pop()
        if _is_ours(inside.get(folder, set())):
            if not folder:
                raise _refused(root)
            found.leave_out(OURS, "/".join(folder))
            continue
        below = []
        for name in sorted(inside.get(folder, ())):
            parts = (*folder, name)
            path = "/".join(parts)
            if reason := rules.left_out(path, name):
                found.leave_out(reason, path)
                continue
            if parts in inside:
                below.append(parts)
            if parts in files and rules.matches(path):
                found.files.append(path)
            elif parts in files:
                found.leave_out(UNMATCHED, path)
        waiting += reversed(below)
    found.files.sort(key=parts_of)
    return found


def parts_of(path: str) -> list[str]:
    """Returns the parts of a path, by which paths are sorted."""
    return path.split("/")


def _walk_folder(found: Walk, rules: Rules, top: str, links: list[str]) -> None:
    """Adds the files below one folder; links to other folders are added to `links`."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        here = os.path.join(found.root, folder) if folder else found.root
        with _unreadable(here):
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        if _is_ours({entry.name for entry in entries}):
            if not folder:
                raise _refused(here)
            del found.folders[_id_of(os.stat(here))]
            found.leave_out(OURS, folder)
            continue
        below = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if reason := rules.left_out(path, entry.name):
                found.leave_out(reason, path)
            elif not entry.is_symlink() and entry.is_dir(follow_symlinks=False):
                with _unreadable(entry.path):
                    identity = _id_of(os.stat(entry.path))
                if identity in found.folders:  # mounted twice, or below a link
                    found.leave_out(AGAIN, path)
                else:
                    found.folders[identity] = path
                    below.append(path)
            elif kind := _left_out_kind(entry):
                found.leave_out(kind, path)
            elif entry.is_dir():
                links.append(path)
            elif rules.matches(path):
                found.files.append(path)
            else:
                found.leave_out(UNMATCHED, path)
        waiting += reversed(below)


def _left_out_kind(entry: os.DirEntry) -> str | None:
    """Returns the kind of an entry that is neither a file or folder nor a link to one; None for any other."""
    if not entry.is_symlink():
        return None if entry.is_file() else SPECIAL
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return NOWHERE
        raise _missing(error, entry.path) from None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else SPECIAL


def _refused(folder: str) -> UserError:
    return UserError(
        f"config.data.source={folder}: is a store or a run of this program, and not text; a store is given as "
        "config.data.store"
    )


def _is_ours(names: set[str]) -> bool:
    has_data = "train" in names or any(name.startswith("part-00000") for name in names)  # also an unfinished one
    is_store = has_data and not names.isdisjoint({"store.json", "progress.json"})
    return is_store or {"config.json", "checkpoints"} <= names


def _id_of(status: os.stat_result) -> Id:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _unreadable(path: str) -> Iterator[None]:
    """Turns an OSError inside the block into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise _missing(error, path) from None


def _missing(error: OSError, path: str) -> UserError:
    return UserError(f"config.data.source: {path} can't be read ({error.strerror}); its files would be missing")


def place_of(path: str, walked: Walk, rules: Rules) -> str | None:
    """Returns where a walk reads or would read a file or folder, which need not exist: its path relative to the source;
    None if it would not be read."""
    if is_bucket(path) or is_bucket(walked.root):
        root, parts = walked.root.rstrip("/") + "/", []
        if not is_bucket(root) or not f"{path}/".startswith(root):
            return None
        for name in filter(None, f"{path}/".removeprefix(root).split("/")):
            parts.append(name)
            if rules.left_out("/".join(parts), name):
                return None
        return "/".join(parts)
    below: list[str] = []
    for folder in _up(os.path.realpath(path)):
        if os.path.isdir(folder) and (top := walked.folders.get(_id_of(os.stat(folder)))) is not None:
            for name in reversed(below):
                top = f"{top}/{name}" if top else name
                if rules.left_out(top, name) or os.path.isdir(os.path.join(walked.root, top)):
                    return None  # it was left out, or would be
                break
            return top
        below.append(os.path.basename(folder))
    return None


def _up(path: str) -> Iterator[str]:
    yield path
    while (above := os.path.dirname(path)) != path:
        path = above
        yield path
