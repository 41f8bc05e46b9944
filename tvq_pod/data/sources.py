"""What config.data.source stands for: which files are read, as what, and which of them are held out by their names."""

import collections
import dataclasses
import glob
import json
import os
import pathlib
import re
from collections.abc import Iterator

from tvq_pod.config.settings import GENERATED, DataSettings
from tvq_pod.data.compressed import SUFFIXES as COMPRESSED_SUFFIXES
from tvq_pod.data.compressed import binary_kind, first_bytes, opened
from tvq_pod.data.document import Names
from tvq_pod.data.walk import Rules, Walk, parts_of, walk
from tvq_pod.errors import UserError

BUILT_IN = ("stdlib", "novels", *GENERATED)
SUFFIXES = {  # of files of many documents; any other file is text, or BINARY
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "json": (".json",),  # JSON lines, if that is what is in it
    "parquet": (".parquet", ".pq"),
    "arrayrecord": (".array_record", ".arrayrecord"),
}
ARCHIVES = (
    *(".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".lzma", ".z", ".npz", ".jar", ".whl"),
    *(".deb", ".rpm", ".iso", ".dmg", ".apk"),
)
BINARY = (
    *ARCHIVES,
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ico", ".heic", ".avif", ".psd"),
    *(".mp3", ".mp4", ".m4a", ".wav", ".flac", ".ogg", ".avi", ".mov", ".mkv", ".webm"),
    *(".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".odt", ".ods", ".epub", ".mobi"),
    *(".so", ".o", ".dll", ".exe", ".dylib", ".pyc", ".pyo", ".class", ".wasm", ".ttf", ".otf", ".woff", ".woff2"),
    *(".npy", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".safetensors", ".h5", ".hdf5", ".onnx", ".arrow"),
    *(".feather", ".orc", ".avro", ".tfrecord", ".sqlite", ".sqlite3"),
)
SHARD = re.compile(r"-\d+-of-\d+$")
ABOUT = re.compile(  # files that say something about the files of records beside them
    r"(readme|license|licence|copying|notice|citation|changelog|authors)(\.\w+)?|_success|_metadata|_common_metadata"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|features\.json|sha256sums?|md5sums?|checksums?(\.\w+)?",
)
SPLIT_WORDS = dict(train="train", validation="validation", valid="validation", dev="validation", val="validation",
                   test="test")  # fmt: skip
HEAD_BYTES = 2**16  # of a .json file that are looked at


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """path: where it is. name: below the source. kind: what its name says: a key of SUFFIXES, "binary" or "text".
    is_given: whether config.data.source names it. split: which its name says, if names decide."""

    path: str
    name: str
    kind: str
    is_given: bool
    split: str | None = None
    begin: int = 0  # what is read of it: the lines that begin in these bytes, or these row groups
    end: int | None = None  # None: all of it
    n_before: int = 0  # lines that end before `begin`, or rows before that row group


@dataclasses.dataclass(frozen=True)
class Listing:
    """format: text, lines, jsonl, parquet or arrayrecord. files: in the order in which they are read. holdout: hash,
    position, names, validation or test. note: what should be known of that. walks: of the source's folders."""

    source: str
    format: str
    files: list[File]
    left_out: dict[str, Names]
    holdout: str
    note: str
    walks: list[Walk]

    def lines(self) -> Iterator[str]:
        """What is read and what is left out, for people."""
        found: dict[str, Names] = {}
        for file in self.files:
            found.setdefault(suffix_of(file.name) or "without a suffix", Names()).add(file.name)
        kinds = sorted(found.items(), key=lambda item: -item[1].count)
        by_kind = "; ".join(f"{names.count:,} {suffix} ({names})" for suffix, names in kinds[:8])
        more = f"; {len(kinds) - 8} kinds more" if len(kinds) > 8 else ""
        yield f"  reads {len(self.files):,} file{'s' * (len(self.files) != 1)} as {self.format}: {by_kind}{more}"
        for reason, names in self.left_out.items():
            yield f"  leaves out {names.count:,} {reason}: {names}"
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
    """What is read of config.data.source, which is one or more paths, as config.data.format says.

    Raises UserError if nothing is there, what is there is not of that format, or a folder can't be read.
    """
    files, left_out, walks = _found(data)
    format = dict(folder="text").get(data.format, data.format)
    if format == "auto":
        format = _guessed(data, files)
    files = list(_of_format(format, files, left_out))
    if not files:
        _refuse_all(data, format, left_out)
    for file in files:
        if format == "jsonl" and file.kind == "json":
            _check_json_lines(file.path)
    return Listing(data.source, format, *_held_out(data, format, files, left_out), walks)


# ------------------------------------------------- which files there are
def _found(data: DataSettings) -> tuple[list[File], dict[str, Names], list[Walk]]:
    rules, given = Rules(data), _given(data)
    files, left_out, walks = [], {}, []
    seen: set[str] = set()
    for path in given:
        if os.path.isdir(path):
            walks.append(walked := walk(path, rules))
            label = "" if len(given) == 1 else f"{path.rstrip('/')}/"
            here = [File(os.path.join(path, name), label + name, kind_of(name), False) for name in walked.files]
            for reason, names in walked.left_out.items():
                left_out.setdefault(reason, Names()).extend(names, label)
        else:
            name = os.path.basename(path) if len(given) == 1 else path
            here = [File(path, name, kind_of(name), True)]
        for file in here:
            real = os.path.realpath(file.path) if len(given) > 1 else file.path
            if real in seen:
                left_out.setdefault("given twice", Names()).add(file.name)
            else:
                files.append(file)
            if len(given) > 1:
                seen.add(real)
    return files, left_out, walks


def _given(data: DataSettings) -> list[str]:
    """The paths that config.data.source names: one that is there, or several with commas between them, and globs."""
    source = data.source
    if source and os.path.exists(source):
        return [source]
    paths = []
    for part in filter(None, (part.strip() for part in source.split(","))):
        if os.path.exists(part):
            paths.append(part)
        elif glob.has_magic(part):
            found = sorted(glob.glob(part, recursive=True, include_hidden=data.hidden), key=parts_of)
            if not found:
                raise UserError(f"config.data.source={source}: no file or folder matches {part}; give another glob")
            paths += found
        else:
            what = f"{part} does not exist (is not there)" if part != source else "is not there"
            raise UserError(f"config.data.source={source}: {what}{_wanted(data)}")
    if not paths:
        raise UserError(f"config.data.source={source}: is not there{_wanted(data)}")
    return paths


def _wanted(data: DataSettings) -> str:
    if data.format != "auto":
        return f"; config.data.format={data.format} wants it"
    return (
        f"; must be {', '.join(map(repr, BUILT_IN))}, a text file, a folder, files of JSON lines, Parquet or "
        "ArrayRecord, a glob, or several of these with commas between them"
    )


# ------------------------------------------------- what they are
def _plain_name(name: str) -> str:
    """A file's name in small letters, without what says that it is compressed, or one of several."""
    name = SHARD.sub("", os.path.basename(name).lower())
    for suffix in COMPRESSED_SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return SHARD.sub("", name.removesuffix(suffix))
    return name


def suffix_of(name: str) -> str:
    """The end of a file's name that says its kind, as it is counted: .txt, .json.gz."""
    plain, name = _plain_name(name), SHARD.sub("", os.path.basename(name).lower())
    return os.path.splitext(plain)[1] + (os.path.splitext(name)[1] if name != plain else "")


def kind_of(name: str) -> str:
    """What a file's name says that it is: a key of SUFFIXES, "binary", or "text" for any other."""
    plain = _plain_name(name)
    suffix = os.path.splitext(plain)[1]
    if suffix in BINARY:
        return "binary"
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), "text")


def _is_about(file: File) -> bool:
    return ABOUT.fullmatch(os.path.basename(file.name).lower()) is not None


def _guessed(data: DataSettings, files: list[File]) -> str:
    """What "auto" stands for. Raises UserError if that can't be said."""
    if len(files) == 1 and files[0].is_given:
        return _guessed_of_one(files[0])
    of_records = {file.kind for file in files if file.kind in SUFFIXES and not _is_about(file)}
    has_text = any(file.kind == "text" and not _is_about(file) for file in files)
    if not of_records or (of_records == {"json"} and has_text):  # a folder of source code has JSON files, too
        return "text"
    kinds = {dict(json="jsonl").get(kind, kind) for kind in of_records}
    kinds |= {"text"} if has_text else set()
    if len(kinds) > 1:
        raise UserError(
            f"config.data.format=auto: {data.source} has files of several formats ({', '.join(sorted(kinds))}); say "
            "which is meant, or choose files with config.data.glob or config.data.exclude"
        )
    return kinds.pop()


def _guessed_of_one(file: File) -> str:
    begins, inside = first_bytes(pathlib.Path(file.path))
    kind = binary_kind(inside)
    if kind == "a Parquet file":
        return "parquet"
    plain = _plain_name(file.name)
    is_binary = kind is not None or file.kind == "binary"
    if kind == "compressed twice" or (is_binary and begins and plain.endswith(ARCHIVES)):
        raise UserError(
            f"config.data.format=auto: {file.path} is compressed, and no text; unpack it, or give config.data.format "
            "(enwik8 for enwik8.zip)"
        )
    if is_binary:
        raise UserError(
            f"config.data.format=auto: {file.path} is {kind or f'a {os.path.splitext(plain)[1]} file'}, and no text; "
            "give text, or files of JSON lines, Parquet or ArrayRecord"
        )
    return dict(json="jsonl").get(file.kind, file.kind)


def _of_format(format: str, files: list[File], left_out: dict[str, Names]) -> Iterator[File]:
    """The files that are read; others are added to `left_out`."""
    is_one = len(files) == 1 and files[0].is_given
    for file in files:
        is_about = _is_about(file) and not is_one
        if format in ("text", "lines"):
            reason = "that are no text, by their names" if file.kind == "binary" and not is_one else ""
        elif is_about:
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
    """Raises UserError: there is no file to read."""
    found = "; ".join(f"{names.count:,} {reason} ({names})" for reason, names in left_out.items())
    found = f"; left out: {found}" if found else ""
    if format in ("text", "lines"):
        raise UserError(f"config.data.source={data.source}: is empty; give a corpus with text in it{found}")
    suffixes = (*SUFFIXES[format], *(SUFFIXES["json"] if format == "jsonl" else ()))
    raise UserError(
        f"config.data.source={data.source}: has no file that ends with {' or '.join(suffixes)}, as "
        f"config.data.format={data.format} says{found}"
    )


def _check_json_lines(path: str) -> None:
    """Raises UserError if what is in a .json file is one value over several lines."""
    with opened(pathlib.Path(path)) as file:
        head = file.read(HEAD_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
    line, newline, _ = head.partition(b"\n")
    if not line:
        return
    why = ""
    if line.startswith(b"["):
        why = "it is one JSON array"
    elif not line.startswith(b"{"):
        why = "its first line is no JSON object"
    elif newline or len(head) < HEAD_BYTES:
        try:
            json.loads(line)
        except ValueError:
            why = "its first line is no JSON object"
    if why:
        raise UserError(
            f"config.data.source={path}: is not JSON lines, since {why}; write one object a line, as `jq -c .[] FILE` "
            "does with an array, or leave it out with config.data.exclude, or give config.data.format=text to read "
            "it as text"
        )


# ------------------------------------------------- what is held out
def split_by_folder(name: str) -> str | None:
    """The split that a path names in one of its folders, the topmost first."""
    return next((SPLIT_WORDS[folder] for folder in name.lower().split("/")[:-1] if folder in SPLIT_WORDS), None)


def split_by_word(name: str) -> tuple[str | None, str]:
    """The split that one word of a file's name names, and the name without that word and without numbers."""
    words = re.split(r"([._-])", os.path.basename(name).lower())
    places = [place for place, word in enumerate(words) if word in SPLIT_WORDS]
    if len(places) != 1:
        return None, ""
    split, words[places[0]] = SPLIT_WORDS[words[places[0]]], "*"
    return split, re.sub(r"\d+", "0", "".join(words))


def splits_by_name(names: list[str]) -> list[str | None]:
    """The splits that paths name: by their folders, or by a word in which alone the files' names differ, numbers aside:
    train.py and test_all.py are no splits."""
    splits = [split_by_folder(name) for name in names]
    by_word = [split_by_word(name) if split is None else (split, "") for name, split in zip(names, splits, strict=True)]
    patterns = {pattern for (_, pattern), split in zip(by_word, splits, strict=True) if split is None and pattern}
    return [split for split, _ in by_word] if len(patterns) == 1 else splits


def _names_below(data: DataSettings, files: list[File]) -> list[str]:
    """The files' paths below the source, or, if that is several paths, below the folder that they have in common."""
    if os.path.exists(data.source) or len(files) == 1:
        return [file.name for file in files]
    paths = [os.path.abspath(file.path) for file in files]
    above = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, above) for path in paths]


def _held_out(
    data: DataSettings, format: str, files: list[File], left_out: dict[str, Names]
) -> tuple[list[File], dict[str, Names], str, str]:
    """The files with their splits, those that are left out, what decides, and a note for people."""
    holdout, note = data.holdout, ""
    if holdout == "position" and format != "text":
        raise UserError(
            f"config.data.holdout=position: is for text files, and {data.source} is read as {format}; give hash"
        )
    if holdout in ("validation", "test"):
        note = f"all are held out for {holdout}: the store is only for evaluation"
        return [dataclasses.replace(file, split=holdout) for file in files], left_out, holdout, note
    is_one = len(files) == 1 and files[0].is_given
    if holdout == "auto" and is_one:
        return files, left_out, "position" if format == "text" else "hash", note
    if holdout in ("auto", "names"):
        by_name = splits_by_name(_names_below(data, files))
        named = [dataclasses.replace(file, split=split) for file, split in zip(files, by_name, strict=True)]
        splits = {file.split for file in named}
        if None not in splits and (holdout == "names" or splits != {"train"}):
            return named, left_out, "names", note
        without = Names()
        for file in named:
            if file.split is None:
                without.add(file.name)
        if holdout == "names":
            raise UserError(
                f"config.data.holdout=names: {without.count} files name no split ({without}); a folder or a word of "
                "the name must be train, validation, valid, dev, val or test; leave others out with "
                "config.data.exclude, or give hash"
            )
        if "train" in splits and len(splits - {None}) > 1:
            note = (
                f"held out by hash, since {without.count:,} files name no split ({without}), though others do; "
                "config.data.exclude leaves files out"
            )
        holdout = "hash"
    return files, left_out, holdout, note
