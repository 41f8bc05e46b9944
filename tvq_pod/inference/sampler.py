"""The sampler continues many documents side by side, one token of each at a time. All begin together; continuous.py
refills rows.

The state of a row never grows, so neither does the time per token. The ordinary model reads the prompts' full blocks;
the rest, less than a block, is fed to the same loop that draws tokens. The loop runs on the device and returns after
`CHUNK` tokens, or when all rows of the device have ended. Rows are distributed over the devices, which do not
communicate: each has the weights and runs its own loop.

A row's output depends on its own prompt, its own number and the seed, and not on the other rows.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvq_pod.config.settings import SampleSettings
from tvq_pod.data.vocab import END_OF_DOC
from tvq_pod.inference.draw_loop import NO_TOKEN, Sampling, draw_chunk
from tvq_pod.nn.decode import decode_state, decode_weights
from tvq_pod.nn.model import Transformer
from tvq_pod.nn.types import TransformerConfig
from tvq_pod.parallel.processes import from_process_zero

CHUNK = 64  # the most tokens between two returns to the host
CHUNK_SECONDS = 1.0  # target time of a chunk if one process samples: a slow model's text should appear as it is drawn
FEWEST = 8  # tokens between two returns: each return has a fixed cost, which grows with the state of all rows
MAX_ROWS = SampleSettings().max_rows  # on one device at a time
STATE_BYTES = 2**32  # limit for all rows of a device, if the device does not report its memory

ROWS, ALL = PartitionSpec("rows"), PartitionSpec()
_BY_ROW = ("doc_ids", "position", "last_doc", "cache_doc", "leaving_doc", "units")


class Sampler:
    """Continues documents with one model and one set of sampling parameters; compiled functions are kept between
    calls."""

    _slot_by_row = False  # see decode.py

    def __init__(
        self, config: TransformerConfig, sampling: Sampling, n_rows: int, devices: list, max_rows: int | None = None
    ):
        """n_rows: the number of rows expected; at most `batch_size` of them are sampled side by side.

        devices: those of this process, of which at most n_rows are used; or all devices of a job, whose processes must
        then make the same calls. max_rows: the most rows on a device; MAX_ROWS if not given.
        """
        self._config, self._sampling = config.replace(is_train=False), sampling
        self._max_rows = max_rows or MAX_ROWS
        self._local = all(device.process_index == jax.process_index() for device in devices)
        self._mesh = Mesh(np.array(devices[:n_rows] if self._local else devices), ("rows",))
        self.batch_size = self._mesh.size * min(self._rows_that_fit(), math.ceil(n_rows / self._mesh.size))
        self._own = own = functools.partial(jax.shard_map, mesh=self._mesh, check_vma=False)
        self._model_state = model_state = PartitionSpec(None, "rows")  # layers come first
        self._begin = jax.jit(
            lambda: Transformer.initial_state(self._config, self.batch_size),
            out_shardings=NamedSharding(self._mesh, model_state),
        )
        self._read = jax.jit(
            own(self._read_block, in_specs=(ALL, model_state, ROWS, ROWS), out_specs=model_state), donate_argnums=1
        )
        self._state_specs = dict.fromkeys(_BY_ROW, ROWS) | dict(slot=ROWS if self._slot_by_row else ALL)
        self._start = jax.jit(
            own(
                lambda state: decode_state(state, self._config, self._slot_by_row),
                in_specs=model_state,
                out_specs=self._state_specs,
            )
        )
        draw = own(
            functools.partial(draw_chunk, sampling=sampling, config=self._config),
            in_specs=(ALL, self._state_specs, ROWS, ROWS, ALL, ALL),
            out_specs=(self._state_specs, ROWS, ROWS, ROWS),
        )
        self._draw = jax.jit(draw, donate_argnums=(1, 2))
        everywhere = NamedSharding(self._mesh, ALL)
        self._replicate = jax.jit(lambda x: x, out_shardings=everywhere)
        self._weights = jax.jit(lambda params: decode_weights(params, self._config), out_shardings=everywhere)

    def sample(
        self,
        params: dict,
        prompts: list[np.ndarray],
        seed: int,
        length: int,
        *,
        first_row: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[np.ndarray]:
        """Continues documents that begin with `prompts`, int [n] each, at most `batch_size` of them, by up to `length`
        tokens each. Yields the drawn tokens, int32 [rows, n] with n <= CHUNK, until all rows have ended. They are
        NO_TOKEN where a row was still reading or had ended.

        params: those of `Transformer`; with several processes, on the given devices, in their order. Row i draws with
        the random numbers first_row + i of the seed. stop_at_end: whether an end-of-document ends a row; it is then not
        part of the row.
        """
        block_len = self._config.block_len
        prompts = [np.concatenate([[END_OF_DOC], prompt]).astype(np.int32) for prompt in prompts]
        # At least one token of a prompt is left to the loop: reading it gives the logits of the first draw.
        n_blocks = np.array([(len(prompt) - 1) // block_len for prompt in prompts])
        params = jax.device_put(params, NamedSharding(self._mesh, ALL)) if self._local else params
        state = self._begin()
        if any(n_blocks):
            whole = params if self._local else self._replicate(params)
            for index in range(max(n_blocks)):
                tokens = np.zeros([self.batch_size, block_len], np.int32)
                for row in np.flatnonzero(index < n_blocks):
                    tokens[row] = prompts[row][index * block_len : (index + 1) * block_len]
                has_block = self._all_rows(index < n_blocks, False)
                state = self._read(whole, state, self._put(tokens), self._put(has_block))
            del whole
        state, weights = self._start(state), self._weights(params)
        del params
        rest = [prompt[n * block_len :] for prompt, n in zip(prompts, n_blocks, strict=True)]
        seen = self._put(self._seen(prompts, self.batch_size))
        yield from self._chunks(weights, state, seen, rest, seed, length, first_row, stop_at_end)

    def _chunks(self, weights, state, seen, rest, seed, length, first_row, stop_at_end) -> Iterator[np.ndarray]:
        """rest: the tokens of each prompt after its blocks, at least one."""
        n_rows, block_len = len(rest), self._config.block_len
        given = np.full([self.batch_size, block_len + CHUNK], NO_TOKEN, np.int32)
        for row, tokens in enumerate(rest):
            given[row, : len(tokens)] = tokens
        n_given, token = self._all_rows([len(tokens) for tokens in rest], 1), given[:, 0]
        number, lengths = first_row + np.arange(self.batch_size), np.full(self.batch_size, length)
        is_done, n_drawn = np.full(n_rows, length == 0), np.zeros(n_rows, int)
        place, n_steps = 0, FEWEST if self._local else CHUNK
        while not is_done.all():
            began = time.monotonic()
            rows = dict(token=token, index=place + 1 - n_given, number=number, length=lengths)
            rows |= dict(is_done=self._all_rows(is_done, True))
            rows |= dict(following=given[:, min(place + 1, block_len) :][:, :CHUNK])
            state, seen, drawn, _ = self._draw_rows(weights, state, seen, rows, seed, n_steps, stop_at_end)
            token = _next_tokens(rows["following"][:, :n_steps], drawn)
            drawn = drawn[:n_rows]
            is_end = (drawn == END_OF_DOC) & stop_at_end
            drawn[is_end] = NO_TOKEN
            n_drawn += np.sum(drawn != NO_TOKEN, axis=1)
            is_done |= is_end.any(axis=1) | (n_drawn >= length)
            seconds = max(time.monotonic() - began, 1e-6)
            yield drawn
            place += n_steps
            if self._local and place > n_steps:  # the first chunk included compilation
                n_steps = int(np.clip(n_steps * CHUNK_SECONDS / seconds, FEWEST, min(4 * n_steps, CHUNK)))

    def _draw_rows(self, weights, state, seen, rows, seed, n_steps, stop_at_end):
        """Runs `draw_chunk` on all rows: (state, seen, drawn int32 [batch_size, n_steps], logprobs). rows: NumPy
        arrays."""
        rows = {name: self._put(np.asarray(x, bool if x.dtype == bool else np.int32)) for name, x in rows.items()}
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        span = np.array([n_steps, stop_at_end], np.int32)
        state, seen, *told = self._draw(weights, state, seen, rows, key, span)
        drawn, logprobs = (np.array(x if self._local else self._replicate(x).addressable_data(0)) for x in told)
        return state, seen, drawn[:, :n_steps], logprobs[:, :n_steps]

    # --- on the devices ----------------------------------------------------------------------------------------------

    def _read_block(self, params, state, tokens, has_block):
        """Reads tokens [B, L] in the rows where has_block [B] is True; the other rows are unchanged."""
        # reading a prompt takes little of the time
        model = Transformer(self._config.replace(attention="xla", block_len=tokens.shape[1]))
        new_state, _ = model.apply({"params": params}, state, tokens, jnp.zeros_like(tokens))

        def chosen(new, old):
            return jnp.where(has_block.reshape(1, -1, *[1] * (new.ndim - 2)), new, old)

        return jax.tree.map(chosen, new_state, state)

    # --- from the host -----------------------------------------------------------------------------------------------

    def _put(self, x: np.ndarray) -> jax.Array:
        """Puts x [batch_size, ...] on the devices of its rows."""
        return jax.make_array_from_callback(x.shape, NamedSharding(self._mesh, ROWS), lambda index: x[index])

    def _all_rows(self, values, padding) -> np.ndarray:
        """The values, and padding for unused rows."""
        return np.concatenate([values, np.full(self.batch_size - len(values), padding)])

    def _seen(self, prompts: Sequence[np.ndarray], n_rows: int) -> np.ndarray:
        """The tokens that each prompt has, except the document's start, as bool [n_rows, n_seen]."""
        seen = np.zeros([n_rows, self._sampling.n_seen], bool)
        for row, prompt in enumerate(prompts if self._sampling.n_seen else ()):
            seen[row, prompt[1:]] = True
        return seen

    def _rows_that_fit(self) -> int:
        """The number of rows that fit on one device, besides what is already there."""
        state = jax.eval_shape(lambda: decode_state(Transformer.initial_state(self._config, 1), self._config))
        row_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        stats = jax.local_devices()[0].memory_stats() or {}
        free = (stats["bytes_limit"] - stats["bytes_in_use"]) // 4 if "bytes_limit" in stats else STATE_BYTES
        most = int(np.clip(free // row_bytes, 1, self._max_rows))
        return most if self._local else from_process_zero(most)


def _next_tokens(following: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The token that each row reads after a chunk [B, n]: the last one that it was given or drew; any token if it has
    ended."""
    last = following[:, -1]
    return np.maximum(np.where(last == NO_TOKEN, drawn[:, -1], last), 0)
