"""Continuous sampling: a row that has ended gets the next prompt, while the other rows continue.

A prompt is read by itself, one at a time on each device, and its state replaces that of the row that it gets. Each row
has its own slot of the ring (see nn/decode.py), so a row's output depends on its prompt, its number and the seed: not
on the other rows, and not on when it began.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tvq_pod.data.vocab import END_OF_DOC
from tvq_pod.inference.draw_loop import NO_TOKEN, Sampling
from tvq_pod.inference.sampler import ALL, CHUNK, FEWEST, ROWS, Sampler
from tvq_pod.nn.decode import decode_state
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig

REFILL = 32  # tokens between two returns to the host while prompts wait: a row that ends sooner is idle until then
SHORT_BLOCK = 16  # tokens; the rest of a prompt after its full blocks is read in blocks of this size

EndedBy = Literal["length", "end_of_document", "stop"]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A document to continue.

    tokens: integers [n], its beginning. number: selects its random numbers. length: the most tokens to draw. is_last:
    called with each token as it is drawn; True ends the row, with ended_by="stop".
    """

    tokens: np.ndarray
    number: int
    length: int
    is_last: Callable[[int], bool] = lambda token: False


@dataclasses.dataclass(frozen=True, eq=False)
class Continuation:
    """The tokens drawn for a request: tokens int32 [n], without an end-of-document that ended it; logprobs float32 [n],
    in nats, or [0] without sampling.logprobs."""

    request: Request
    tokens: np.ndarray
    logprobs: np.ndarray
    ended_by: EndedBy


class ContinuousSampler(Sampler):
    """Samples as `Sampler` does, for any number of prompts: n_rows is the number expected."""

    _slot_by_row = True

    def __init__(
        self, config: TransformerConfig, sampling: Sampling, n_rows: int, devices: list, max_rows: int | None = None
    ):
        super().__init__(config, sampling, n_rows, devices, max_rows)
        self._begin_one = jax.jit(
            lambda: Transformer.initial_state(self._config, self._mesh.size),
            out_shardings=NamedSharding(self._mesh, self._model_state),
        )
        insert = self._own(
            self._insert_one,
            in_specs=(self._state_specs, ROWS, self._model_state, ROWS, ROWS),
            out_specs=(self._state_specs, ROWS),
        )
        self._insert = jax.jit(insert, donate_argnums=(0, 1))

    def sample_each(
        self, params: dict, requests: Sequence[Request], seed: int, *, stop_at_end: bool = True
    ) -> Iterator[Continuation]:
        """Yields the continuation of each request, as soon as it has ended. All processes of a job must call this with
        the same requests, and consume everything that it yields.

        params: those of `Transformer`; with several processes, on the given devices, in their order. stop_at_end:
        whether an end-of-document ends a row; it is then not part of the row.
        """
        for request in requests:
            if not request.length:
                yield Continuation(request, np.zeros([0], np.int32), np.zeros([0], np.float32), "length")
        waiting = collections.deque(request for request in requests if request.length)
        if not waiting:
            return
        params = jax.device_put(params, NamedSharding(self._mesh, ALL)) if self._local else self._replicate(params)
        weights, state = self._weights(params), self._start(self._begin())
        seen = self._put(np.zeros([self.batch_size, self._sampling.n_seen], bool))
        rows: dict[int, _Row] = {}
        while waiting or rows:
            empty = [place for place in self._places() if place not in rows]
            new = {place: _Row(waiting.popleft(), self._config.block_len) for place in empty[: len(waiting)]}
            state, seen = self._loaded(params, state, seen, new)
            rows |= new
            n_steps = _n_steps(list(rows.values()), bool(waiting))
            state, seen, tokens, logprobs = self._draw_rows(
                weights, state, seen, self._as_arrays(rows), seed, n_steps, stop_at_end
            )
            for place in sorted(rows):
                ended_by = rows[place].take(tokens[place], logprobs[place], stop_at_end)
                if ended_by:
                    yield rows.pop(place).result(ended_by)

    def _places(self) -> list[int]:
        """All places for rows: the first on each device, then the second on each, and so on."""
        return np.arange(self.batch_size).reshape(self._mesh.size, -1).T.ravel().tolist()

    def _as_arrays(self, rows: "dict[int, _Row]") -> dict[str, np.ndarray]:
        """The arrays of all rows that `draw_chunk` takes."""
        names = ("token", "index", "number", "length")
        arrays = {name: np.zeros(self.batch_size, np.int32) for name in names}
        is_done = np.ones(self.batch_size, bool)
        following = np.full([self.batch_size, CHUNK], NO_TOKEN, np.int32)
        for place, row in rows.items():
            is_done[place] = False
            values = row.token, row.index, row.request.number, row.request.length
            for name, value in zip(names, values, strict=True):
                arrays[name][place] = value
            given = row.rest[row.n_read + 1 :][:CHUNK]
            following[place, : len(given)] = given
        return arrays | dict(is_done=is_done, following=following)

    def _loaded(self, params, state, seen, new: "dict[int, _Row]"):
        """(state, seen) with new rows, which each device reads one after another."""
        own = self.batch_size // self._mesh.size
        queues = [collections.deque(place for place in new if place // own == n) for n in range(self._mesh.size)]
        while any(queues):
            places = [queue.popleft() if queue else None for queue in queues]
            rows = [None if place is None else new[place] for place in places]
            one = self._begin_one()
            for size in dict.fromkeys((self._config.block_len, SHORT_BLOCK)):  # one size if they are equal
                blocks = [row.blocks(size) if row else [] for row in rows]
                for index in range(max(map(len, blocks))):
                    has_block = np.array([index < len(own_blocks) for own_blocks in blocks])
                    tokens = np.zeros([self._mesh.size, size], np.int32)
                    for n in np.flatnonzero(has_block):
                        tokens[n] = blocks[n][index]
                    one = self._read(params, one, self._put(tokens), self._put(has_block))
            prompts = [row.prompt if row else np.zeros([1], np.int32) for row in rows]
            inside = np.array([-1 if place is None else place % own for place in places], np.int32)
            state, seen = self._insert(
                state, seen, one, self._put(inside), self._put(self._seen(prompts, self._mesh.size))
            )
        return state, seen

    def _insert_one(self, state, seen, one, place, seen_one):
        """Overwrites the row at place [1] with another, on one device; -1: overwrites none."""
        (place,) = place
        at = jnp.maximum(place, 0)

        def write(of_all, new):
            old = jax.lax.dynamic_slice_in_dim(of_all, at, 1, axis=0)
            return jax.lax.dynamic_update_slice_in_dim(of_all, jnp.where(place < 0, old, new), at, axis=0)

        return jax.tree.map(write, (state, seen), (decode_state(one, self._config, self._slot_by_row), seen_one))


class _Row:
    """A request that is being continued. prompt: int32 [n], with the document's start; rest: its tokens after all
    blocks, at least one; n_read: the number of tokens that the loop has read."""

    def __init__(self, request: Request, block_len: int):
        self.request, self._block_len = request, block_len
        self.prompt = np.concatenate([[END_OF_DOC], request.tokens]).astype(np.int32)
        self._n_in_blocks = (len(self.prompt) - 1) // block_len * block_len
        self._n_in_short_blocks = 0
        if block_len > SHORT_BLOCK:
            self._n_in_short_blocks = (len(self.prompt) - 1 - self._n_in_blocks) // SHORT_BLOCK * SHORT_BLOCK
        self.rest = self.prompt[self._n_in_blocks + self._n_in_short_blocks :]
        self.n_read, self._tokens, self._logprobs = 0, [], []

    def blocks(self, size: int) -> np.ndarray:
        """The part of the prompt that is read in blocks of this size, block_len or SHORT_BLOCK: int32 [n, size]."""
        begin = 0 if size == self._block_len else self._n_in_blocks
        length = self._n_in_blocks if size == self._block_len else self._n_in_short_blocks
        return self.prompt[begin : begin + length].reshape(-1, size)

    @property
    def token(self) -> int:
        """The token that the loop reads next."""
        return self.rest[self.n_read] if self.n_read < len(self.rest) else self._tokens[-1]

    @property
    def index(self) -> int:
        """The index of the next step among those that draw; below 0 while the row reads its prompt."""
        return self.n_read + 1 - len(self.rest)

    def take(self, tokens: np.ndarray, logprobs: np.ndarray, stop_at_end: bool) -> EndedBy | None:
        """Takes the tokens and logprobs of a chunk, [n] each; returns why the row has ended, if it has."""
        self.n_read += len(tokens)
        for n, token in enumerate(tokens.tolist()):
            if token == NO_TOKEN:
                continue
            if token == END_OF_DOC and stop_at_end:
                return "end_of_document"
            self._tokens.append(token)
            self._logprobs.extend(logprobs[n : n + 1])
            if self.request.is_last(token):
                return "stop"
            if len(self._tokens) == self.request.length:
                return "length"
        return None

    def result(self, ended_by: EndedBy) -> Continuation:
        """The continuation, with all tokens drawn so far."""
        return Continuation(
            self.request, np.array(self._tokens, np.int32), np.array(self._logprobs, np.float32), ended_by
        )


def _n_steps(rows: list[_Row], is_any_waiting: bool) -> int:
    """The number of tokens until the next return to the host. While prompts wait, no row should be idle for long."""
    left = [row.request.length - row.index for row in rows]
    return int(np.clip(min(left), FEWEST, REFILL)) if is_any_waiting else int(np.clip(max(left), FEWEST, CHUNK))
