"""Recall by distance for any run: the generated corpus `recall`, in the tokens of the run's vocabulary.

Each key and each value is encoded by itself, so that no token has parts of two of them. In the byte vocabulary these
are exactly the documents of data/recall.py. A value is a hit if each of its tokens is the likeliest.
"""

import dataclasses

import numpy as np

from tvq_pod.config.relations import check_recall
from tvq_pod.config.settings import Settings
from tvq_pod.data.recall import VALUES, key_text, recall
from tvq_pod.data.vocab import UNKNOWN, Vocab
from tvq_pod.errors import UserError
from tvq_pod.inference.haystacks import Score, encoded_text
from tvq_pod.inference.recall import NAMES, WINDOWS, Recall

SPLIT = "test"


@dataclasses.dataclass(frozen=True, eq=False)
class RecallDocument:
    """tokens: int32 [n]. begins, ends: the positions in tokens of values whose keys were seen before, int64 [m] each.
    distances: tokens since the key's value was last seen, int64 [m]."""

    tokens: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    distances: np.ndarray


def measure_recall(score: Score, vocab: Vocab, settings: Settings) -> Recall:
    """Measures recall over config.eval.suite_trials documents of at most config.eval.suite_longest tokens, made with
    the settings config.data.recall_*. All processes of a job must call it with the same arguments. Raises UserError if
    the vocabulary can't encode keys and values."""
    documents = recall_documents(vocab, settings)
    sums, bounds = np.zeros([3, len(NAMES)]), np.array(WINDOWS) * settings.model.mem_len
    scores = score([document.tokens for document in documents])
    for document, (nats, hits) in zip(documents, scores, strict=True):
        kinds = np.searchsorted(bounds, document.distances)
        n_hits, summed = (np.concatenate([[0], np.cumsum(x, dtype=np.float64)]) for x in (hits, nats))
        is_hit = n_hits[document.ends] - n_hits[document.begins] == document.ends - document.begins
        losses = summed[document.ends] - summed[document.begins]
        for total, weights in zip(sums, (np.ones(len(kinds)), is_hit, losses), strict=True):
            total += np.bincount(kinds, weights, len(NAMES))
    n_values, n_hits, nats = sums
    chance = 1 / settings.data.recall_values
    return Recall(n_values.astype(np.int64), n_hits.astype(np.int64), nats, settings.model.mem_len, chance)


def recall_documents(vocab: Vocab, settings: Settings) -> list[RecallDocument]:
    """See `measure_recall`."""
    data, longest, key_bytes = settings.data, settings.eval.suite_longest, settings.data.recall_key_bytes
    check_recall(dataclasses.replace(data, recall_bytes=longest * (key_bytes + 1)), "recall")
    keys = _encoded([key_text(key, key_bytes) for key in range(data.recall_keys)], vocab)
    values = _encoded([VALUES[value : value + 1] for value in range(data.recall_values)], vocab)
    n_pairs = longest // (max(map(len, keys.values())) + max(map(len, values.values())))
    if n_pairs <= data.recall_pairs:
        raise UserError(
            f"config.eval.suite_longest={longest}: has room for {n_pairs} pairs, which is no more than the table of "
            f"config.data.recall_pairs={data.recall_pairs}; give a greater length, or fewer pairs"
        )
    n_bytes, trials = n_pairs * (key_bytes + 1), settings.eval.suite_trials
    sized = dataclasses.replace(data, recall_documents=0, recall_held_out=trials, recall_bytes=n_bytes)
    texts = [bytes(document.text) for document in recall(sized) if document.split == SPLIT]
    return [_document(text, key_bytes, keys, values) for text in texts]


def _document(text: bytes, key_bytes: int, keys: dict[bytes, list[int]], values: dict[bytes, list[int]]):
    """Encodes a document. text: pairs, end to end."""
    tokens, seen, found = [], {}, []
    for at in range(0, len(text), key_bytes + 1):
        key, value = text[at : at + key_bytes], text[at + key_bytes : at + key_bytes + 1]
        tokens += keys[key]
        if key in seen:
            found.append((len(tokens), len(tokens) + len(values[value]), len(tokens) - seen[key]))
        seen[key] = len(tokens)
        tokens += values[value]
    begins, ends, distances = np.array(found, np.int64).T
    return RecallDocument(np.array(tokens, np.int32), begins, ends, distances)


def _encoded(parts: list[bytes], vocab: Vocab) -> dict[bytes, list[int]]:
    """The tokens of each part. Raises UserError if a part has no tokens, unknown ones, or the same as another part."""
    found = {part: encoded_text(part.decode(), vocab).tolist() for part in parts}
    for part, tokens in found.items():
        if not tokens or UNKNOWN in tokens:
            raise UserError(f"--suite=recall: the vocabulary {vocab.name} can't encode {part.decode()!r}")
        if others := [other for other, same in found.items() if other != part and same == tokens]:
            names = f"{part.decode()!r} from {others[0].decode()!r}"
            raise UserError(f"--suite=recall: the vocabulary {vocab.name} can't distinguish {names}")
    return found
