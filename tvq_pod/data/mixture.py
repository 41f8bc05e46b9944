"""Several stores as one: a run reads them in proportion to weights, still as a pure function of the step.

Tokens of all stores are one virtual array, documents of the first store first. How streams mix them: see
streams.py.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import cast

from etils import epath

from tvq_pod.config.mixture_schedule import weights_of
from tvq_pod.config.settings import OWN_SPLITS, generated
from tvq_pod.data.parted import Array, end_to_end, joined
from tvq_pod.data.store import SPLITS, Part, Split, Stage, TokenStore
from tvq_pod.data.vocab import Vocab
from tvq_pod.errors import UserError


class Mixture:
    """Stores of one vocabulary, open for reading; to whoever reads, it is a TokenStore.

    Attributes: see TokenStore. path is that of the first store.
    """

    def __init__(self, stores: list[TokenStore], weights: list[float], schedule: str = ""):
        """weights: of tokens; they need not add up to 1. schedule: see config/mixture_schedule.py.

        Raises UserError for stores that do not fit each other.
        """
        first = stores[0]
        for store in stores[1:]:
            if store.vocab_name != first.vocab_name:
                raise UserError(
                    f"config.data.mixture: {store.path} has vocabulary {store.vocab_name}, and {first.path} "
                    f"{first.vocab_name}; all must have the same"
                )
            _check_splits(first, store)
        if len({store.fingerprint for store in stores}) < len(stores):
            raise UserError("config.data.mixture: the same documents are there twice; give each store once")
        self._given = weights, schedule
        self._stores, self._weights = stores, [weight / sum(weights) for weight in weights]
        self.path, self.vocab_name, self.n_vocab = first.path, first.vocab_name, first.n_vocab
        self._changes = weights_of(schedule, len(stores))
        read: list = [
            [store.fingerprint, round(weight, 9)] for store, weight in zip(stores, self._weights, strict=True)
        ]
        read += [[first_step, [round(weight, 9) for weight in later]] for first_step, later in self._changes]
        self.fingerprint = hashlib.sha256(json.dumps(read).encode()).hexdigest()
        names = ("n_documents", "n_tokens", "n_bytes")
        self.meta = dict(
            splits={
                split: {name: sum(store.meta["splits"][split][name] for store in stores) for name in names}
                for split in SPLITS
            }
        )

    @staticmethod
    def open(text: str, schedule: str = "") -> "Mixture":
        """Of config.data.mixture, "STORE=WEIGHT,STORE=WEIGHT", and config.data.mixture_schedule.

        Raises UserError if that is not its form, or a store is not there.
        """
        stores, weights = [], []
        for part in text.split(","):
            path, equals, weight = part.strip().rpartition("=")
            try:
                number = float(weight)
            except ValueError:
                number = 0.0
            if not equals or not path or not 1e-6 <= number <= 1e6:
                raise UserError(
                    f"config.data.mixture={text}: {part.strip() or 'nothing'} is not STORE=WEIGHT with a weight of "
                    "1e-6 to 1e6"
                )
            stores.append(TokenStore(epath.Path(path)))
            weights.append(number)
        return Mixture(stores, weights, schedule)

    @property
    def n_parts(self) -> int:
        """How many parts its stores have together."""
        return sum(store.n_parts for store in self._stores)

    @property
    def versions(self) -> list[tuple[str, int]]:
        """See TokenStore: of all combinations of its stores' versions; the last is as it is now."""
        return [(mixture.fingerprint, mixture.n_parts) for mixture in self._versions()]

    def as_of(self, fingerprint: str) -> "Mixture | None":
        """See TokenStore."""
        return next((mixture for mixture in self._versions() if mixture.fingerprint == fingerprint), None)

    def _versions(self) -> "Iterator[Mixture]":
        of_each = [[store.as_of(fingerprint) for fingerprint, _ in store.versions] for store in self._stores]
        for stores in itertools.product(*of_each):
            yield Mixture([store for store in stores if store is not None], *self._given)

    def vocab(self) -> Vocab:
        """The vocabulary that the tokens are in."""
        return self._stores[0].vocab()

    @property
    def recall_values(self) -> int:
        """See TokenStore. The most of all stores; 0 if one is another corpus."""
        values = [store.recall_values for store in self._stores]
        return max(values) if all(values) else 0

    def tokens_per_byte(self, split: str) -> float:
        """Tokens, end-of-documents included, per byte of text, as training reads them."""
        if split != "train":
            entry = self.meta["splits"][split]
            return entry["n_tokens"] / max(entry["n_bytes"], 1)
        bytes_per_token = sum(
            weight / store.tokens_per_byte(split) for store, weight in zip(self._stores, self._weights, strict=True)
        )
        return 1 / bytes_per_token

    def names(self, split: str) -> list[str]:
        """See TokenStore; each with the store that it is of."""
        return [f"{store.path}: {name}" for store in self._stores for name in store.names(split)]

    def split(self, name: str) -> Split:
        """Opens a split. Raises UserError if it has no document, for training in any of the stores."""
        there = [
            (store, weight)
            for store, weight in zip(self._stores, self._weights, strict=True)
            if name == "train" or store.meta["splits"][name]["n_documents"]
        ] or [(self._stores[0], 1.0)]
        splits = [store.split(name) for store, _ in there]
        sizes = [split.documents.n_documents for split in splits]
        firsts = itertools.accumulate(sizes[:-1], initial=0)
        parts = [Part(first, n, weight) for first, n, (_, weight) in zip(firsts, sizes, there, strict=True)]
        stages = [
            Stage(change.first_step, tuple(map(_weighted, parts, change.weights)))
            for change in (self._changes if name == "train" else ())
        ]
        return Split(
            stages=tuple(stages),
            tokens=end_to_end([split.tokens for split in splits]),
            documents=joined([split.documents for split in splits]),
            bytes_on_disk=end_to_end(cast(list[Array], [split.bytes_on_disk for split in splits])),
            parts=tuple(parts),
        )


def _weighted(part: Part, weight: float) -> Part:
    return dataclasses.replace(part, weight=weight)


def _check_splits(one: TokenStore, other: TokenStore) -> None:
    """Documents that are in both must be in the same split of both."""
    made = [store.meta | store.meta["made_with"] for store in (one, other)]
    shares = [
        (with_["validation_share"], with_["test_share"])
        for with_ in made
        if not with_.get("own_splits")
        and with_["format"] not in OWN_SPLITS
        and not generated(with_["format"], with_["source"])
    ]
    if len(shares) == 2 and shares[0] != shares[1]:
        raise UserError(
            f"config.data.mixture: {one.path} holds out {shares[0]} for validation and test, and {other.path} "
            f"{shares[1]}; documents of both would be in training and held out"
        )
