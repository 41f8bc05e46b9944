"""Resolving config.data.source: which files are read, in what format, and which are held out by their names."""

import collections
import dataclasses
import glob
import os
import pathlib
from collections.abc import Iterator

from tvq_pod.config.settings import GENERATED, DataSettings
from tvq_pod.data import bucket, hub
from tvq_pod.data.compressed import binary_kind, first_bytes
from tvq_pod.data.document import Names
from tvq_pod.data.kinds import ARCHIVES, SUFFIXES, check_json_lines, first_row, is_about, kind_of, plain_name, suffix_of
from tvq_pod.data.splits import split_by_word, splits_by_name
from tvq_pod.data.walk import EXCLUDED, Rules, Walk, parts_of, walk, walk_names, walk_nothing
from tvq_pod.errors import UserError
from tvq_pod.host.paths import is_bucket

BUILT_IN = ("stdlib", "novels", "ansible", *GENERATED)
LOOKED_AT = 8  # .json files to examine before a corpus is read, if each takes time


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """One file of a corpus, or a part of one. path: where it is. name: its path below the source. kind: by its name: a
    key of SUFFIXES, "binary" or "text"; "hf" for a split of a Hugging Face dataset. is_given: whether
    config.data.source names it. split: the one its name says, if names decide. object: in a bucket, what was listed."""

    path: str
    name: str
    kind: str
    is_given: bool
    split: str | None = None
    object: bucket.Object | None = None
    begin: int = 0  # the part to read: the lines that begin in these bytes, or these row groups
    end: int | None = None  # None: all of it
    n_before: int = 0  # lines that end before `begin`, or rows before that row group

    @property
    def at(self) -> bucket.Place:
        """The place to read it from."""
        return self.object or pathlib.Path(self.path)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a corpus. format: text, lines, jsonl, parquet, arrayrecord or hf; it applies to all files whose kind
    is not hf. files: in reading order. holdout: hash, position, names, validation or test. note: a remark about the
    holdout, to print. walks: of the source's folders. unused: patterns of config.data.exclude that match nothing."""

    source: str
    format: str
    files: list[File]
    left_out: dict[str, Names]
    holdout: str
    note: str
    walks: list[Walk]
    unused: list[str]

    def lines(self) -> Iterator[str]:
        """Yields lines to print about what is read and what is left out."""
        found: dict[str, Names] = {}
        for file in self.files:
            kind = "of datasets" if file.kind == "hf" else suffix_of(file.name) or "without a suffix"
            found.setdefault(kind, Names()).add(file.name)
        kinds = sorted(found.items(), key=lambda item: -item[1].count)
        by_kind = "; ".join(f"{names.count:,} {suffix} ({names})" for suffix, names in kinds[:8])
        more = f"; {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
        what = "split" if self.format == "hf" else "file"
        yield f"  reads {len(self.files):,} {what}{'s' * (len(self.files) != 1)} as {self.format}: {by_kind}{more}"
        for reason, names in self.left_out.items():
            yield f"  leaves out {names.count:,} {reason}: {names}"
        for pattern in self.unused:
            yield f"  config.data.exclude: {pattern} matches nothing"
        if self.holdout == "names":
            n = collections.Counter(file.split for file in self.files)
            yield "  by their names, " + ", ".join(f"{n[split]:,} for {split}" for split in n if split)
        elif self.holdout == "position":
            yield (
                "  each file is one document, whose last lines are held out for validation and test; "
                "config.data.format=lines reads each line as a document"
            )
        if self.note:
            yield f"  {self.note}"


def listing(data: DataSettings) -> Listing:
    """Lists the files to read from config.data.source, which is one or more paths, as config.data.format says.

    Raises UserError if a path does not exist, nothing is in that format, or a folder can't be read.
    """
    rules = Rules(data)
    files, left_out, walks = _found(data, rules)
    format = dict(folder="text").get(data.format, data.format)
    if format == "auto":
        format = _guessed(data, files)
    files = list(_of_format(format, files, left_out))
    if not files:
        _refuse_all(data, format, left_out)
    if format == "jsonl":
        for number, file in enumerate(file for file in files if file.kind == "json"):
            if number < LOOKED_AT or not file.object:
                check_json_lines(file.at)
    is_folder = len(walks) == 1 and not any(file.is_given for file in files)
    held_out = _held_out(data, format, files, left_out, is_folder)
    return Listing(data.source, format, *held_out, walks, list(rules.unused))


# ------------------------------------------------- finding files
def _found(data: DataSettings, rules: Rules) -> tuple[list[File], dict[str, Names], list[Walk]]:
    files, left_out, walks = [], {}, []
    given = _given(data, rules, left_out)
    seen: set[str] = set()
    for place in given:
        path = str(place)
        label = "" if len(given) == 1 else f"{path.rstrip('/')}/"
        if isinstance(place, bucket.Object):
            name = os.path.basename(path) if len(given) == 1 else path
            here = [File(path, name, kind_of(name), True, object=place)]
        elif hub.is_hub(path):
            name = hub.parse(path)
            here = _splits(name, is_one=len(given) == 1)
            if name.folder:  # so that a run inside it is refused
                walks.append(walk_nothing(name.folder))
        elif is_bucket(path):
            objects = bucket.found_below(path)
            walks.append(walked := walk_names(path, objects, rules))
            here = [File(objects[n].path, label + n, kind_of(n), False, object=objects[n]) for n in walked.files]
        elif os.path.isdir(path):
            walks.append(walked := walk(path, rules))
            here = [File(os.path.join(path, name), label + name, kind_of(name), False) for name in walked.files]
        else:
            name = os.path.basename(path) if len(given) == 1 else path
            here = [File(path, name, kind_of(name), True)]
            if not os.path.isfile(path) and os.path.exists(path):
                raise UserError(f"config.data.source={path}: is neither a file nor a folder; write it to a file first")
        for reason, names in walks[-1].left_out.items() if walks and walks[-1].root == path else ():
            left_out.setdefault(reason, Names()).extend(names, label)
        for file in here:
            is_local = not file.object and file.kind != "hf"
            real = os.path.realpath(file.path) if len(given) > 1 and is_local else file.path
            if real in seen:
                left_out.setdefault("given twice", Names()).add(file.name)
            else:
                files.append(file)
            if len(given) > 1:
                seen.add(real)
    return files, left_out, walks


def _splits(name: hub.Name, is_one: bool) -> list[File]:
    """Returns the splits of a Hugging Face dataset. The name of a single requested split does not decide what is held
    out."""
    label = os.path.basename(name.dataset.rstrip("/")) + (f"/{name.config}" if name.config else "")
    found = []
    for split in hub.splits_of(name):
        whole = f"{label}/{split}"
        own = None if is_one and name.split else split_by_word(split)[0]
        found.append(File(str(name._replace(split=split)), whole, "hf", True, own))
    return found


def _given(data: DataSettings, rules: Rules, left_out: dict[str, Names]) -> list[str | bucket.Object]:
    """Returns what config.data.source names: one existing path, or several paths and globs separated by commas. What
    config.data.exclude removes from a glob is added to `left_out`."""
    source = data.source
    if source and os.path.exists(source):
        return [source]
    places: list[str | bucket.Object] = []
    for part in parts_of_source(source):
        if hub.is_hub(part) or os.path.exists(part):
            places.append(part)
        elif is_bucket(part) and (there := bucket.found_at(part)):
            places.append(there)
        elif glob.has_magic(part):
            if is_bucket(part):
                found = bucket.found_by(part, data.hidden)
            else:
                found = sorted(glob.glob(part, recursive=True, include_hidden=data.hidden), key=parts_of)
            for place in found:
                if rules.excludes(str(place), os.path.basename(str(place))):
                    left_out.setdefault(EXCLUDED, Names()).add(str(place))
                else:
                    places.append(place)
            if not found:
                raise UserError(f"config.data.source={source}: no file or folder matches {part}; give another glob")
        else:
            what = f"{part} does not exist" if part != source else "does not exist"
            raise UserError(f"config.data.source={source}: {what}{_wanted(data)}")
    if not places:
        what = "does not exist" if not left_out else f"all of it is left out by config.data.exclude={data.exclude}"
        raise UserError(f"config.data.source={source}: {what}{_wanted(data)}")
    return places


def parts_of_source(source: str) -> list[str]:
    """Returns the paths, globs and names that config.data.source lists, if it is not a single path with commas."""
    return [part for part in (part.strip() for part in source.split(",")) if part]


def _wanted(data: DataSettings) -> str:
    if data.format != "auto":
        return f"; config.data.format={data.format} needs it"
    return (
        "; give a file, a folder or a glob, locally or as gs://BUCKET/PATH; hf:NAME; several of these with commas "
        f"between them; or one of {', '.join(BUILT_IN)}"
    )


# ------------------------------------------------- their format
def _guessed(data: DataSettings, files: list[File]) -> str:
    """Returns the format that "auto" stands for. Raises UserError if that is not clear."""
    files = [file for file in files if file.kind != "hf"] or files
    if files and files[0].kind == "hf":
        return "hf"
    if len(files) == 1 and files[0].is_given:
        return _guessed_of_one(files[0])
    of_records = {file.kind for file in files if file.kind in SUFFIXES and not is_about(file.name)}
    has_text = any(file.kind == "text" and not is_about(file.name) for file in files)
    if not of_records or (of_records == {"json"} and has_text and not _has_rows(data, files)):  # as source code has
        _refuse_only_about(data, files)
        return "text"
    kinds = {dict(json="jsonl").get(kind, kind) for kind in of_records}
    kinds |= {"text"} if has_text else set()
    if len(kinds) > 1:
        raise UserError(
            f"config.data.format=auto: {data.source} has files of several formats ({', '.join(sorted(kinds))}); give "
            "one of them, or choose files with config.data.glob or config.data.exclude"
        )
    return kinds.pop()


def _has_rows(data: DataSettings, files: list[File]) -> bool:
    """Returns whether one of the first .json files holds rows of text."""
    found = [file for file in files if file.kind == "json" and not is_about(file.name)]
    return any(data.text_field.split(".")[0] in first_row(file.at) for file in found[:LOOKED_AT])


def _refuse_only_about(data: DataSettings, files: list[File]) -> None:
    """Raises UserError if the only text files describe other files, which are not text."""
    others = [file for file in files if file.kind == "binary"]
    if others and all(file.kind == "binary" or is_about(file.name) for file in files):
        is_saved = any(file.path.endswith(".arrow") for file in others)
        remedy = f"give hf:{data.source}" if is_saved else "give config.data.format=text if those are the corpus"
        raise UserError(
            f"config.data.source={data.source}: has {len(others):,} files that are not text ({others[0].name}), and "
            f"besides them only files about a corpus; {remedy}"
        )


def _guessed_of_one(file: File) -> str:
    begins, inside = first_bytes(file.at)
    kind = binary_kind(inside)
    if kind == "a Parquet file":
        return "parquet"
    plain = plain_name(file.name)
    is_binary = kind is not None or file.kind == "binary"
    if kind == "compressed twice" or (is_binary and begins and plain.endswith(ARCHIVES)):
        raise UserError(
            f"config.data.format=auto: {file.path} is compressed, and not text; unpack it, or give config.data.format "
            "(enwik8 for enwik8.zip)"
        )
    if is_binary:
        raise UserError(
            f"config.data.format=auto: {file.path} is {kind or f'a {os.path.splitext(plain)[1]} file'}, and not text; "
            "give text, or files of JSON lines, Parquet or ArrayRecord"
        )
    return dict(json="jsonl").get(file.kind, file.kind)


def _of_format(format: str, files: list[File], left_out: dict[str, Names]) -> Iterator[File]:
    """Yields the files that are read; others are added to `left_out`."""
    is_one = len(files) == 1 and files[0].is_given
    for file in files:
        beside = is_about(file.name) and not is_one
        if file.kind == "hf":
            reason = ""
        elif format in ("text", "lines"):
            reason = "that are not text, by their names" if file.kind == "binary" and not is_one else ""
        elif beside:
            reason = "about the corpus, by their names"
        elif file.is_given or dict(json="jsonl").get(file.kind, file.kind) == format:
            reason = ""
        else:
            reason = f"that are not {format}, by their names"
        if reason:
            left_out.setdefault(reason, Names()).add(file.name)
        else:
            yield file


def _refuse_all(data: DataSettings, format: str, left_out: dict[str, Names]) -> None:
    """Raises the UserError that there is no file to read."""
    found = "; ".join(f"{names.count:,} {reason} ({names})" for reason, names in left_out.items())
    found = f"; left out: {found}" if found else ""
    if format in ("text", "lines"):
        raise UserError(f"config.data.source={data.source}: is empty; give a corpus with text in it{found}")
    suffixes = (*SUFFIXES[format], *(SUFFIXES["json"] if format == "jsonl" else ()))
    raise UserError(
        f"config.data.source={data.source}: has no file whose name ends with {' or '.join(suffixes)}; give another "
        f"config.data.format than {data.format}{found}"
    )


# ------------------------------------------------- the held-out files
def _splits_by_name(files: list[File], is_folder: bool) -> list[str | None]:
    """Returns the splits that the files' names say: their paths below the source, or, if the source is several paths,
    below their common folder."""
    named = [file for file in files if file.kind != "hf"]
    names = [file.name for file in named]
    if not is_folder and len(named) > 1:
        paths = [os.path.abspath(f"/{file.path}" if file.object else file.path) for file in named]
        above = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, above) for path in paths]
    splits = dict(zip((file.path for file in named), splits_by_name(names), strict=True))
    return [splits.get(file.path, file.split) for file in files]


def _held_out(
    data: DataSettings, format: str, files: list[File], left_out: dict[str, Names], is_folder: bool
) -> tuple[list[File], dict[str, Names], str, str]:
    """Returns the files with their splits, those that are left out, the holdout that applies, and a note to print."""
    holdout, note = data.holdout, ""
    if holdout == "position" and format != "text":
        raise UserError(
            f"config.data.holdout=position: is for text files, but {data.source} is read as {format}; give hash"
        )
    if holdout in ("validation", "test"):
        note = f"all are held out for {holdout}: the store is for evaluation only"
        return [dataclasses.replace(file, split=holdout) for file in files], left_out, holdout, note
    if holdout == "auto" and len(files) == 1 and files[0].kind != "hf":
        is_held_out = not files[0].is_given and splits_by_name([files[0].name])[0] in ("validation", "test")
        if not is_held_out:
            return files, left_out, "position" if format == "text" else "hash", note
    if holdout in ("auto", "names"):
        by_name = _splits_by_name(files, is_folder)
        named = [dataclasses.replace(file, split=split) for file, split in zip(files, by_name, strict=True)]
        beside = [file for file in named if file.split is None and is_about(file.name)]
        if format == "text" and beside and len(beside) < len(named):  # README.md beside train, validation and test
            rest = [file for file in named if file not in beside]
            if None not in (splits := {file.split for file in rest}) and splits != {"train"}:
                for file in beside:
                    left_out.setdefault("about the corpus, by their names", Names()).add(file.name)
                named = rest
        splits = {file.split for file in named}
        if None not in splits and (holdout == "names" or splits != {"train"}):
            return named, left_out, "names", note
        without = Names()
        for file in named:
            if file.split is None:
                without.add(file.name)
        if holdout == "names":
            raise UserError(
                f"config.data.holdout=names: the names of {without.count} files give no split ({without}); a folder or "
                "a word of the name must be train, validation, valid, dev, val or test; leave others out with "
                "config.data.exclude, or give hash"
            )
        if "train" in splits and len(splits) > 1:
            note = (
                f"held out by hash, since the names of {without.count:,} files give no split ({without}), although "
                "others do; config.data.exclude leaves files out"
            )
    files = [dataclasses.replace(file, split=None) for file in files]
    return files, left_out, holdout if holdout == "position" else "hash", note
