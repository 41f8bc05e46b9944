"""In which split a file is, by its path."""

import re

from tvq_pod.data.kinds import plain_name

SPLIT_WORDS = dict(train="train", validation="validation", valid="validation", dev="validation", val="validation",
                   test="test")  # fmt: skip


def split_by_folder(name: str) -> str | None:
    """The split that a path names in one of its folders, the topmost first."""
    return next((SPLIT_WORDS[folder] for folder in name.lower().split("/")[:-1] if folder in SPLIT_WORDS), None)


def split_by_word(name: str) -> tuple[str | None, str]:
    """The split that one word of a file's name names, and the name without that word, without numbers, and without what
    says how it is compressed."""
    words = re.split(r"([._-])", plain_name(name))
    places = [place for place, word in enumerate(words) if word in SPLIT_WORDS]
    if len(places) != 1:
        return None, ""
    split, words[places[0]] = SPLIT_WORDS[words[places[0]]], "*"
    return split, re.sub(r"[._-]?\d+(-of-\d+)?", "", "".join(words))


def splits_by_name(names: list[str]) -> list[str | None]:
    """The splits that paths name: by their folders, or by a word in which alone the files' names differ, numbers aside:
    train.py and test_all.py are no splits."""
    splits = [split_by_folder(name) for name in names]
    by_word = [split_by_word(name) if split is None else (split, "") for name, split in zip(names, splits, strict=True)]
    patterns = {pattern for (_, pattern), split in zip(by_word, splits, strict=True) if split is None and pattern}
    return [split for split, _ in by_word] if len(patterns) == 1 else splits
