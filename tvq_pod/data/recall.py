"""Generated corpora, to measure what a memory holds. They need no download and can have any size.

`recall` is multi-query associative recall (Arora et al., Zoology, arXiv 2312.04927): a document is a sequence of pairs
of a key and a value. Each document has a table that gives each key its value, so a value can be predicted exactly where
its key was seen earlier in the document, and only by chance elsewhere. `passkey` hides a few such pairs in unrelated
words, and asks for them later and at the end.

A document depends on the corpus's name, config.data.recall_seed, its split, its number and the other settings
config.data.recall_*. Its random numbers are SHAKE-128 of the first four, and all arithmetic is on integers: a document
has the same bytes on every machine, and no two splits share random numbers.
"""

import bisect
import dataclasses
import hashlib
import itertools
import string
from collections.abc import Iterator, Sequence

import numpy as np

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.document import Document, Documents
from tvq_pod.data.vocab import N_SPECIAL

KEYS = (string.ascii_uppercase + string.digits + string.ascii_lowercase).encode()  # the characters of keys
VALUES = string.punctuation.encode()
DRAWN_AT_ONCE = 2**10  # random numbers
N_WORDS = 256  # in the vocabulary of passkey's text
NEAREST_QUESTION = 4  # passkey asks for a pair at least 2 ** 4 bytes after stating it


def recall(data: DataSettings) -> Documents:
    """Yields documents of complete pairs, at most `recall_bytes` bytes long. Each begins with its table: every key
    once, with its value. Every later pair asks for one of these keys again.

    A key is chosen by its rank: the number of other keys seen since it was last seen. With K keys and N pairs, once in
    max(2, N / K) pairs the key is drawn uniformly from the half that has not been seen for longest. Otherwise it is
    drawn from the other half, with a probability proportional to 1 / (rank + 1). So some keys wait for most of the
    document, and every distance up to that occurs.

    With `recall_smaller`, training documents have several sizes, and each size has about the same number of tokens.
    """
    for split, name, draws in _each(data, "recall"):
        sized = _of_some_size(data, draws) if data.recall_smaller and split == "train" else data
        yield Document(name, _recall_text(sized, draws), split)


def _of_some_size(data: DataSettings, draws: "Draws") -> DataSettings:
    """Returns the settings of one document. Its length is halved n times, n <= recall_smaller, with a probability
    proportional to 2 ** n. It has as many pairs as fit into it four times, but at least two."""
    halvings = (1 + draws.below(2 ** (data.recall_smaller + 1) - 1)).bit_length() - 1
    pair_bytes = data.recall_key_bytes + 1
    n_bytes = data.recall_bytes >> halvings
    n_pairs = min(data.recall_pairs, max(2, n_bytes // (4 * pair_bytes)))
    return dataclasses.replace(data, recall_pairs=n_pairs, recall_bytes=max((n_pairs + 1) * pair_bytes, n_bytes))


def _recall_text(data: DataSettings, draws: "Draws") -> bytes:
    pairs = table(data, draws)
    n_keys, n_asked = len(pairs), data.recall_bytes // len(pairs[0]) - len(pairs)
    n_newer = n_keys - n_keys // 2
    likely = list(itertools.accumulate(2**20 // (rank + 1) for rank in range(n_newer)))
    one_in = max(2, (n_keys + n_asked) // n_keys)
    recent = pairs[::-1]  # most recently seen first
    text = list(pairs)
    for _ in range(n_asked):
        if n_newer < n_keys and not draws.below(one_in):
            rank = n_newer + draws.below(n_keys - n_newer)
        else:
            rank = bisect.bisect_right(likely, draws.below(likely[-1]))
        recent.insert(0, recent.pop(rank))
        text.append(recent[0])
    return b"".join(text)


def passkey(data: DataSettings) -> Documents:
    """Yields documents of exactly `recall_bytes` bytes: words, each after a space, drawn from 256 that depend on the
    seed. A pair takes the place of a word. Every pair is stated in the first eighth of the document, asked for once at
    a distance whose logarithm is uniform, if the document is that long, and asked for again at the end, where all pairs
    are listed in a new order."""
    words = passkey_words(data)
    return (Document(name, _passkey_text(data, draws, words), split) for split, name, draws in _each(data, "passkey"))


def _passkey_text(data: DataSettings, draws: "Draws", words: list[bytes]) -> bytes:
    pairs = [b" " + pair for pair in table(data, draws)]
    end = data.recall_bytes - len(pairs) * len(pairs[0])  # from here on, every pair is asked for
    n_octaves = end.bit_length() - NEAREST_QUESTION
    places = []
    for pair in pairs:
        stated = draws.below(data.recall_bytes // 8)
        octave = 1 << NEAREST_QUESTION + draws.below(n_octaves)
        places += [(stated, pair), (stated + octave + draws.below(octave), pair)]
    text = bytearray()
    for place, pair in sorted(places):
        if place + len(pair) > end:
            break
        while len(text) < place:
            text += words[draws.below(N_WORDS)]
        if len(text) + len(pair) <= end:
            text += pair
    while len(text) < end:
        text += words[draws.below(N_WORDS)]
    return bytes(text[:end]) + b"".join(draws.some(pairs, len(pairs)))


def passkey_words(data: DataSettings) -> list[bytes]:
    """Returns the words of the corpus `passkey`, of two to seven letters, with a space before each."""
    draws, letters = Draws(f"passkey words {data.recall_seed}"), string.ascii_lowercase.encode()
    return [b" " + bytes(letters[draws.below(len(letters))] for _ in range(2 + draws.below(6))) for _ in range(N_WORDS)]


def _each(data: DataSettings, kind: str) -> Iterator[tuple[str, str, "Draws"]]:
    """Yields the split, the name and the random numbers of every document."""
    held_out = data.recall_held_out
    for split, n_documents in (("train", data.recall_documents), ("validation", held_out), ("test", held_out)):
        for number in range(n_documents):
            name = f"{kind} {data.recall_seed} {split} {number}"
            yield split, name, Draws(name)


def table(data: DataSettings, draws: "Draws") -> list[bytes]:
    """Returns a document's pairs, each a key and its value: distinct keys, in random order."""
    keys = draws.some(range(data.recall_keys), data.recall_pairs)
    return [
        key_text(key, data.recall_key_bytes) + VALUES[value : value + 1]
        for key in keys
        for value in [draws.below(data.recall_values)]
    ]


def key_text(key: int, n_bytes: int) -> bytes:
    """Returns the key of a number below len(KEYS) ** n_bytes."""
    digits = [key // len(KEYS) ** place % len(KEYS) for place in range(n_bytes)]
    return bytes(KEYS[digit] for digit in reversed(digits))


class Draws:
    """Random numbers seeded by a name: SHAKE-128 of the name and a counter, as 32-bit integers, little-endian."""

    def __init__(self, name: str):
        self._numbers = self._drawn(name)

    @staticmethod
    def _drawn(name: str) -> Iterator[int]:
        for counter in itertools.count():
            drawn = hashlib.shake_128(f"{name} {counter}".encode()).digest(4 * DRAWN_AT_ONCE)
            yield from np.frombuffer(drawn, "<u4").tolist()

    def below(self, n: int) -> int:
        """Draws an integer from 0 to n - 1. The probabilities differ by less than 2 ** -32."""
        return next(self._numbers) * n >> 32

    def some(self, of: Sequence, n: int) -> list:
        """Draws n different elements, in random order."""
        left = list(of)
        for place in range(n):
            other = place + self.below(len(left) - place)
            left[place], left[other] = left[other], left[place]
        return left[:n]


# ------------------------------------------------- which values can be predicted
def distances(tokens: np.ndarray, doc_ids: np.ndarray) -> np.ndarray:
    """Returns, for each value, the number of tokens since its key last had its value in the document; 0 for tokens that
    are not the value of a key seen earlier: int32 [n].

    tokens: int [n], documents in the byte vocabulary, with end-of-document tokens. doc_ids: int [n], a different number
    for each document. Only the tokens are used: a value is a punctuation mark, and its key is the one or two letters
    and digits before it.
    """
    is_key, is_value = (np.isin(tokens, np.frombuffer(letters, np.uint8) + N_SPECIAL) for letters in (KEYS, VALUES))
    at = np.flatnonzero(is_value[1:] & is_key[:-1]) + 1
    has_two = (at > 1) & is_key[at - 2]
    last, first = tokens[at - 1].astype(np.int64), np.where(has_two, tokens[at - 2], 0).astype(np.int64)
    keys = (doc_ids[at].astype(np.int64) << 32) + (first << 16) + last
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    found = np.zeros(len(tokens), np.int32)
    found[at[order[again]]] = at[order[again]] - at[order[again - 1]]
    return found
