"""Documents that hide an answer in unrelated text and ask for it at the end, of any length, for any vocabulary.

`passkey` is the task of Mohtashami and Jaggi (Landmark Attention, arXiv 2305.16300): one number among repeated
sentences. `needle` is retrieval with several keys as in RULER (Hsieh et al., arXiv 2404.06654): four numbers, each with
a word, among sentences that all differ, and a question about one of the words. `pair` is a key and its value in the
words of the generated corpus `passkey` (data/recall.py), for models that were trained on that corpus and have read no
English.

A document depends on its kind, seed, length, depth and number alone: the random numbers are those of data/recall.py.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.recall import N_WORDS, Draws, passkey_words, table
from tvq_pod.data.vocab import UNKNOWN, Vocab, pieces
from tvq_pod.errors import UserError
from tvq_pod.parallel.deadlines import still_working

# For documents, int32 [n] each, returns the loss in nats of each token and whether it is the likeliest: see
# BatchedModel.score.
Score = Callable[[Sequence[np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]

N_OTHERS = 3  # other words with numbers in a document of `needle`
REPEATED = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NOUNS = (
    *("river", "garden", "window", "teacher", "letter", "market", "mountain", "kitchen", "sailor", "winter"),
    *("forest", "engine", "painter", "bridge", "village", "farmer", "island", "doctor", "candle", "station"),
    *("harbor", "soldier", "basket", "castle", "morning", "valley", "shepherd", "ladder", "orchard", "tower"),
)
ADJECTIVES = (
    "old",
    "quiet",
    "bright",
    "narrow",
    "small",
    "distant",
    "heavy",
    "gentle",
    "cold",
    "broken",
    "new",
    "dark",
)
VERBS = ("watched", "followed", "left", "found", "remembered", "crossed", "painted", "carried", "forgot", "passed")
ASKED = (
    *("apple", "copper", "dragon", "falcon", "guitar", "hammer", "jacket", "lemon", "magnet", "needle"),
    *("oyster", "pepper", "rocket", "saddle", "tunnel", "velvet", "walnut", "yellow", "zipper", "anchor"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Haystack:
    """A text with something hidden in it. filler: endless texts, of which as many are taken as fit. hidden: depths from
    0 to 1, and the text there. question: the end of the text; answer: what follows it. n_answers: the number of answers
    that are equally likely if nothing is remembered. n_named: the number of answers that the text names."""

    before: str
    filler: Iterator[str]
    hidden: Sequence[tuple[float, str]]
    question: str
    answer: str
    n_answers: int
    n_named: int = 1


def haystack(kind: str, seed: int, length: int, depth: float, number: int, data: DataSettings) -> Haystack:
    """Makes a text of `kind`, one of RETRIEVAL in config/suites.py. length, in tokens, and number only distinguish
    documents. data: the settings for `pair`."""
    draws = Draws(f"{kind} {seed} {length} {depth:.6f} {number}")
    if kind == "passkey":
        key = 10_000 + draws.below(90_000)
        return Haystack(
            before="There is an important piece of information hidden in a lot of irrelevant text. Find it and "
            "memorize it. I will ask you about it at the end.",
            filler=(f" {sentence}" for sentence in itertools.cycle(REPEATED)),
            hidden=[(depth, f" The pass key is {key}. Remember it. {key} is the pass key.")],
            question=" What is the pass key? The pass key is ",
            answer=str(key),
            n_answers=90_000,
        )
    if kind == "needle":
        words = draws.some(ASKED, 1 + N_OTHERS)
        numbers = [1_000_000 + draws.below(9_000_000) for _ in words]
        depths = [depth, *(draws.below(1000) / 1000 for _ in range(N_OTHERS))]
        texts = [f" The magic number for {word} is: {n}." for word, n in zip(words, numbers, strict=True)]
        return Haystack(
            before="Some magic numbers are hidden in the following text. Memorize them. I will ask you about one.",
            filler=_sentences(draws),
            hidden=list(zip(depths, texts, strict=True)),
            question=f" What is the magic number for {words[0]}? The magic number for {words[0]} is: ",
            answer=str(numbers[0]),
            n_answers=9_000_000,
            n_named=1 + N_OTHERS,
        )
    pair, words = table(data, draws)[0].decode(), [word.decode() for word in passkey_words(data)]
    filler = (words[draws.below(N_WORDS)] for _ in itertools.count())
    return Haystack("", filler, [(depth, f" {pair}")], f" {pair[:-1]}", pair[-1], data.recall_values)


def _sentences(draws: Draws) -> Iterator[str]:
    def one_of(words: Sequence[str]) -> str:
        return words[draws.below(len(words))]

    while True:
        yield f" The {one_of(ADJECTIVES)} {one_of(NOUNS)} {one_of(VERBS)} the {one_of(ADJECTIVES)} {one_of(NOUNS)}."


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A document: tokens int32 [n], which end with the n_answer tokens of the answer."""

    tokens: np.ndarray
    n_answer: int


def asked(text: Haystack, length: int, vocab: Vocab) -> Asked:
    """The text with as much filler as fits into `length` tokens, including the answer. The answer's tokens are those in
    which the texts with and without it differ. Raises UserError if the vocabulary can't encode the answer, or the text
    does not fit even without filler."""
    still_working()
    filler: list[str] = []

    def context(n: int) -> str:
        filler.extend(itertools.islice(text.filler, max(0, n - len(filler))))
        places = sorted((round(depth * n), order) for order, (depth, _) in enumerate(text.hidden))
        parts, at = [text.before], 0
        for place, order in places:
            parts += [*filler[at:place], text.hidden[order][1]]
            at = place
        return "".join([*parts, *filler[at:n], text.question])

    n = _most(lambda n: len(encoded_text(context(n) + text.answer, vocab)), length)
    if n is None:
        raise UserError(
            f"--suite: the vocabulary {vocab.name} can't make a document of {length} tokens of {text.before!r}"
        )
    without, tokens = (encoded_text(context(n) + answer, vocab) for answer in ("", text.answer))
    differs = np.flatnonzero(without[: len(tokens)] != tokens[: len(without)])
    n_before = int(differs[0]) if len(differs) else min(len(without), len(tokens))
    if n_before == len(tokens) or np.any(tokens[n_before:] == UNKNOWN):
        raise UserError(f"--suite: the vocabulary {vocab.name} can't encode the answer {text.answer!r}")
    return Asked(tokens, len(tokens) - n_before)


def _most(length_of: Callable[[int], int], most: int) -> int | None:
    """The largest n with length_of(n) <= most, found by regula falsi, since length_of grows nearly linearly. None if
    there is no such n, or no largest one."""
    low, length, high = 0, length_of(0), None
    slope = (length_of(16) - length) / 16
    if length > most or slope <= 0:
        return None
    while high is None or high - low > 1:
        n = low + max(1, int((most - length) / slope))
        n = n if high is None else min(n, high - 1)
        if (found := length_of(n)) <= most:
            low, length = n, found
        else:
            high = n
    return low


def encoded_text(text: str, vocab: Vocab) -> np.ndarray:
    """The token ids, int32 [n], of a text of any length."""
    parts = [vocab.encode(piece) for piece in pieces(text.encode(), vocab)]
    return np.concatenate(parts).astype(np.int32)
