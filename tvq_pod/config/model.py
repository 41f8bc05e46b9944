"""The settings of one model, as a frozen dataclass. No jax here: the command line reads it before it chooses a mode."""

import dataclasses
from typing import Any

UNITS = ("unit0", "unit1")  # of one layer


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Settings of one Transformer-VQ model. `config.model.*` has these names, `is_train` apart.

    Letters: D d_model, K d_k, V d_v, H n_head, S n_code, L block_len, M mem_len.
    """

    d_model: int = 128  # D: width of the residual stream
    d_k: int = 64  # K: width of a head's queries and keys
    d_v: int = 256  # V: width of a head's values and gates
    n_head: int = 1  # H: each head has its own keys, values and codebook
    n_code: int = 128  # S: codes per head
    n_layer: int = 2  # layers of two units each
    n_vocab: int = 259  # 256 bytes + pad, end-of-document, unknown
    block_len: int = 128  # L: tokens that are attended to at once
    mem_len: int = 128  # M: keys kept exact before they go to the cache
    # Added to the scores of keys up to M back; 0: as in the paper. To a new model all keys are alike, so of a long
    # document it sees next to nothing of what is near, and learns it late; with 8, soon
    window_bias: float = 0.0
    agg_cache: bool = True  # False: attention ends with the window
    grad_thru_cache: bool = True  # False: gradients stay inside a block
    attn_type: str = "vq"  # full: quadratic attention over exact keys, for comparison; no codes, no cache
    # How attention of attn_type vq is computed. plain: readable and slow, any JAX transformation goes through it, the
    # oracle of the others; xla: all blocks at once, with a hand-written gradient (reverse mode only); auto: xla
    attention: str = "auto"
    # shga: layers of two gated units, of n_head heads each. mha: attention of n_head heads, then an MLP. mqa: the same,
    # with one key head, value head and codebook for all n_head query heads
    head_type: str = "shga"
    d_ff: int = 0  # width of the MLP; 0: as many parameters in a layer as two gated units with d_v = 2 d_model have
    # How the caches of an update's blocks are made. cumulative: the fastest; serial: quicker to compile, since its
    # program does not grow with T / L
    reduction: str = "cumulative"
    # What each unit keeps for the backward pass. projections: q, k, v and gate before their activations, shortcodes,
    # what attention returns, and what is as small; dots: every matmul without a batch axis; full: its input; none: all
    remat: str = "projections"
    unroll: int = 1  # layers in one turn of the loop over layers: with n_layer, no loop; faster, and slower to compile
    dtype: Any = "float32"  # of activations; softmax, logits, counts and means stay float32
    param_dtype: Any = "float32"  # of weights; the codebook stays float32
    pe_abs: bool = False  # add sinusoids of the position in the document, times a learned scale
    p_dropemb: float = 0.0  # dropout on embeddings
    p_dropsin: float = 0.0  # dropout on the table of relative sinusoids
    p_dropres: float = 0.0  # dropout on each unit's residual
    p_droplyr: float = 0.0  # LayerDrop: a stream skips a unit for one update
    e_tie: bool = False  # output embeddings are the input embeddings
    e_norm: bool = True  # RMSNorm before the output embeddings
    e_scale: float = 1.0  # factor on the logits; tied embeddings, of variance 1, want about d_model ** -0.5 or less
    c_beta: float = 1e-4  # weight of the commit loss
    c_gamma: float = 0.99  # decay of the codebook's moving average, per update
    is_train: bool = False  # dropout on

    @property
    def n_key_head(self) -> int:
        """H: heads of keys and values, each with its codebook."""
        return 1 if self.head_type == "mqa" else self.n_head

    @property
    def value_names(self) -> tuple[str, str]:
        """Names of the axes H and V of keys' values: one key head's are not split where the query heads are."""
        return "key_heads", "shared_value" if self.head_type == "mqa" else "value"

    @property
    def attention_units(self) -> tuple[str, ...]:
        """Names of a layer's units that attend, and so have a state."""
        return UNITS if self.head_type == "shga" else UNITS[:1]

    @property
    def hidden_width(self) -> int:
        """Width of the MLP, a multiple of 128 (a TPU's tile) if it is not given by `d_ff`."""
        if self.d_ff:
            return self.d_ff
        two_gated_units = 2 * (3 * self.d_k + 3 * 2 * self.d_model)  # queries, keys, biases; values, gate, output
        attention = self.n_head * (self.d_k + self.d_v) + self.n_key_head * (2 * self.d_k + self.d_v)
        return max(1, round((two_gated_units - attention) / 2 / 128)) * 128

    def replace(self, **changes) -> "TransformerConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
