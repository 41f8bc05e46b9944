"""Finds stop strings, which end a sample, in text that arrives token by token."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tvq_pod.config.stop_strings import stop_strings
from tvq_pod.data.vocab import PAD, UNKNOWN, Vocab, decoder_after
from tvq_pod.errors import UserError


def encodable_stops(spelled: str, vocab: Vocab) -> tuple[str, ...]:
    """The stop strings of config.sample.stop. Raises UserError if one can't be made from the vocabulary's tokens, since
    no sample could have it."""
    stops = stop_strings(spelled)
    for stop in stops:
        try:
            is_known = not np.any(vocab.encode(stop.encode()) == UNKNOWN)
        except (UnicodeError, UserError):
            is_known = False
        if not is_known:
            raise UserError(
                f"config.sample.stop={spelled}: the vocabulary {vocab.name} can't encode {stop!a}, so that no sample "
                "could have it; give text that it can encode"
            )
    return stops


class StopText:
    """The text of one row, as its tokens arrive, until it has a stop string."""

    def __init__(self, vocab: Vocab, stops: Sequence[str], before: np.ndarray):
        """before: the tokens [n] before the text."""
        self._decoder, self._stops = decoder_after(before, vocab), stops
        self._longest = max(map(len, stops), default=0)
        self._text, self._is_ended = "", False

    def add(self, token: int) -> bool:
        """Adds a token, and returns whether the text now has a stop string."""
        return self._append(self._decoder.decode(token))

    def text(self) -> str:
        """The text before the stop string, or all of it if there is none. No token can be added afterwards."""
        if not self._is_ended:
            self._append(self._decoder.decode(PAD, final=True))
        return self._text

    def _append(self, new: str) -> bool:
        begin = max(0, len(self._text) - self._longest + 1)
        self._text += new
        at = _first(self._text, self._stops, begin)
        if at is not None:
            self._text, self._is_ended = self._text[:at], True
        return self._is_ended


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yields pieces of a text as soon as no stop string can begin in them, up to the first stop string."""
    held, longest = "", max(map(len, stops), default=1)
    for piece in pieces:
        held += piece
        at = _first(held, stops, 0)
        if at is not None:
            yield held[:at]
            return
        n_told = max(0, len(held) - longest + 1)
        yield held[:n_told]
        held = held[n_told:]
    yield held


def _first(text: str, stops: Sequence[str], begin: int) -> int | None:
    """The position of the first stop string in a text, searched from `begin` on."""
    return min((at for stop in stops if (at := text.find(stop, begin)) >= 0), default=None)
