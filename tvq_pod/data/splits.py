"""The split of a file, by its path."""

import re

from tvq_pod.data.kinds import plain_name

SPLIT_WORDS = dict(train="train", validation="validation", valid="validation", dev="validation", val="validation",
                   test="test")  # fmt: skip


def split_by_folder(name: str) -> str | None:
    """Returns the split that is named by a folder of a path, the topmost first."""
    return next((SPLIT_WORDS[folder] for folder in name.lower().split("/")[:-1] if folder in SPLIT_WORDS), None)


def split_by_word(name: str) -> tuple[str | None, str]:
    """Returns the split that is named by one word of a file's name, and the name without that word, numbers and a
    compression suffix."""
    words = re.split(r"([._-])", plain_name(name))
    places = [place for place, word in enumerate(words) if word in SPLIT_WORDS]
    if len(places) != 1:
        return None, ""
    split, words[places[0]] = SPLIT_WORDS[words[places[0]]], "*"
    return split, re.sub(r"[._-]?\d+(-of-\d+)?", "", "".join(words))


def splits_by_name(names: list[str]) -> list[str | None]:
    """Returns the splits that paths name by their folders, or by a word if the files' names differ in nothing but that
    word and numbers: train.py and test_all.py are not splits."""
    splits = [split_by_folder(name) for name in names]
    by_word = [split_by_word(name) if split is None else (split, "") for name, split in zip(names, splits, strict=True)]
    patterns = {pattern for (_, pattern), split in zip(by_word, splits, strict=True) if split is None and pattern}
    return [split for split, _ in by_word] if len(patterns) == 1 else splits
