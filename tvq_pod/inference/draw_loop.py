"""The loop over tokens, on one device: each row reads a token and draws the next one, until all have ended."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tvq_pod.data.vocab import END_OF_DOC
from tvq_pod.inference.draw import draw_tokens, penalized
from tvq_pod.nn.decode import decode_while
from tvq_pod.nn.scores import NEVER
from tvq_pod.nn.types import TransformerConfig

NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters; see `draw_tokens` and `penalized`. allowed: for each id of the vocabulary, whether it may be
    drawn. logprobs: whether the log-probability of each token is returned, too."""

    allowed: tuple[bool, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: bool = False

    @property
    def n_seen(self) -> int:
        """The number of columns of `seen`, for `draw_chunk`: one for each id of the vocabulary, or none if it is not
        used."""
        return 0 if self.repetition_penalty == 1 else len(self.allowed)


def draw_chunk(
    weights: dict,
    state: dict,
    seen: jax.Array,
    rows: dict,
    key: jax.Array,
    span: jax.Array,
    sampling: Sampling,
    config: TransformerConfig,
) -> tuple[dict, jax.Array, jax.Array, jax.Array]:
    """Runs up to n_steps tokens of each row. Returns (state, seen, drawn int32 [B, n], logprobs float32 [B, n]).

    state, weights: see `decode_step`. seen: bool [B, n_seen], the tokens of the prompt and those drawn. rows: token
    [B], read next; index [B], the index of the first draw, below 0 while a prompt is read; number [B], selects the
    random numbers; length [B], the most tokens to draw; is_done [B]; following [B, n], the prompt's tokens after the
    one that is read next, NO_TOKEN after its last. key: data of a jax.random.key. span: n_steps, at most n; and whether
    an end-of-document ends a row.

    drawn has NO_TOKEN where a row was reading or had ended. logprobs are the model's, before temperature and everything
    else that changes them; [B, 0] if sampling.logprobs is False.
    """
    n_steps, stop_at_end = span
    following, n_chunk = rows["following"], rows["following"].shape[1]
    allowed, row = jnp.array(sampling.allowed)[None], jnp.arange(len(following))
    index = rows["index"][:, None] + jnp.arange(n_chunk)[None]
    uniforms = _uniforms(key, rows["number"], index)

    def going(carry):
        return (carry["step"] < n_steps) & ~jnp.all(carry["is_done"])

    def feed(carry):
        return carry["token"], jnp.zeros_like(carry["token"])

    def take(carry, logits):
        step, is_done = carry["step"], carry["is_done"]
        column = functools.partial(jax.lax.dynamic_index_in_dim, index=step, axis=1, keepdims=False)
        wanted = penalized(logits, carry["seen"], sampling.repetition_penalty) if sampling.n_seen else logits
        drawn = draw_tokens(
            jnp.where(allowed, wanted, NEVER),
            column(uniforms),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
        )
        is_given = column(following) != NO_TOKEN
        told = jnp.where(is_given | is_done, NO_TOKEN, drawn)
        is_last = (column(index) + 1 >= rows["length"]) | ((drawn == END_OF_DOC) & (stop_at_end > 0))
        token = jnp.where(is_given, column(following), drawn)
        next_carry = carry | dict(
            step=step + 1,
            token=token,
            is_done=is_done | (is_last & ~is_given),
            told=jax.lax.dynamic_update_index_in_dim(carry["told"], told, step, 1),
        )
        if sampling.n_seen:
            next_carry["seen"] = carry["seen"].at[row, token].set(True, mode="promise_in_bounds", unique_indices=True)
        if sampling.logprobs:
            logprob = logits[row, drawn] - jax.nn.logsumexp(logits, axis=-1)
            next_carry["logprobs"] = jax.lax.dynamic_update_index_in_dim(carry["logprobs"], logprob, step, 1)
        return next_carry

    carry = dict(
        step=jnp.int32(0),
        token=rows["token"],
        is_done=rows["is_done"],
        told=jnp.full_like(following, NO_TOKEN),
        seen=seen,
        logprobs=jnp.zeros([len(following), n_chunk * sampling.logprobs]),
    )
    state, carry = decode_while(going, feed, take, weights, state, carry, config)
    return state, carry["seen"], carry["told"], carry["logprobs"]


def _uniforms(key: jax.Array, numbers: jax.Array, index: jax.Array) -> jax.Array:
    """Random numbers in [0, 1), float32 [B, n]: those with `index` [B, n] in each row's own stream, `numbers` [B]."""
    of_row = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.wrap_key_data(key), numbers)
    draw = jax.vmap(lambda row, index: jax.random.uniform(jax.random.fold_in(row, index)), in_axes=(None, 0))
    return jax.vmap(draw)(of_row, jnp.maximum(index, 0))
