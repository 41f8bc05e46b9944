"""The settings of one model, as a frozen dataclass. It does not import jax: the command line reads it before it chooses
a mode."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge

from tvq_pod.config.bounds import FloatType, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt

UNITS = ("unit0", "unit1")  # of one layer


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Settings of one Transformer-VQ model. All but `is_train` are in `config.model`.

    Letters: D d_model, K d_k, V d_v, H n_head, S n_code, L block_len, M mem_len.
    """

    d_model: PositiveInt = 128
    """D: width of the residual stream."""
    d_k: PositiveInt = 64
    """K: width of a head's queries and keys."""
    d_v: PositiveInt = 256
    """V: width of a head's values and gates."""
    n_head: PositiveInt = 1
    """H: query heads. Each has its own keys, values and codebook; with head_type=mqa they share one of each."""
    n_code: PositiveInt = 128
    """S: codes of each key head."""
    n_layer: PositiveInt = 2
    """Layers, of two units each."""
    n_vocab: Annotated[int, Ge(4)] = 259
    """Number of token ids; bytes need 259: 256, and those of padding, end-of-document and unknown."""
    block_len: PositiveInt = 128
    """L: tokens whose attention is computed at once."""
    mem_len: PositiveInt = 128
    """M: keys that are kept exactly before they go to the cache."""
    window_bias: NonNegativeFloat = 0.0
    """Added to the scores of keys up to M back; 0: as in the paper. To a new model all keys are alike, so in a long
    document it hardly sees what is near, and learns late to use it. With 8 it learns that soon."""
    temperature: Literal["fixed", "learned"] = "fixed"
    """learned: queries are scaled by a learned factor for each head, which starts at 1. Without it, the product of a
    query and a key is at most sqrt(d_k), so one key among more than e ** sqrt(d_k) others can't have most of the
    weight."""
    key_shift: bool = False
    """Add the query of the previous token, times a learned vector, to each key. A token then finds what came after its
    earlier occurrences, from the first step on. Without this, a model must learn it, and needs two units to do so."""
    agg_cache: bool = True
    """Attend to the cache. False: attention ends with the window."""
    grad_thru_cache: bool = True
    """Let gradients flow through the cache. False: they stay within a block."""
    attn_type: Literal["vq", "full"] = "vq"
    """full: quadratic attention over exact keys, for comparison; it has no codes and no cache."""
    attention: Literal["auto", "plain", "xla", "pallas"] = "auto"
    """How attention of attn_type=vq is computed. plain: readable and slow; any JAX transformation goes through it, and
    the others are tested against it. xla: all blocks at once, with a hand-written gradient (reverse mode only).
    pallas: the same as TPU kernels, with mem_len equal to block_len; they have been compiled for TPUs but have not run
    on one yet. auto: pallas on TPUs if it fits and, in a trial at the start of a run, agrees with xla; else xla. The
    program prints which, and why."""
    head_type: Literal["shga", "mqa", "mha"] = "shga"
    """shga: layers of two gated units, of n_head heads each. mha: attention of n_head heads, then an MLP. mqa: the same
    with one key head, value head and codebook for all n_head query heads."""
    d_ff: NonNegativeInt = 0
    """Width of the MLP; 0: a layer has as many parameters as two gated units with d_v = 2 d_model."""
    reduction: Literal["cumulative", "serial"] = "cumulative"
    """How the caches of an update's blocks are computed. cumulative: the fastest. serial: faster to compile, since its
    program does not grow with T / L."""
    remat: Literal["projections", "dots", "full", "none"] = "projections"
    """What each unit keeps for the backward pass. projections: q, k, v and gate before their activations, shortcodes,
    the output of attention, and other small arrays. dots: every matmul without a batch axis. full: only its input.
    none: everything. With attention=pallas, dots and none are the same as projections."""
    unroll: PositiveInt = 1
    """Layers in one iteration of the loop over layers. With n_layer there is no loop: faster, but slower to compile."""
    dtype: FloatType = "float32"
    """Type of activations. Softmax, logits, counts and means stay float32."""
    param_dtype: FloatType = "float32"
    """Type of weights. The codebook stays float32."""
    pe_abs: bool = False
    """Add sinusoids of the position in the document, times a learned scale."""
    p_dropemb: Fraction = 0.0
    """Dropout rate of embeddings."""
    p_dropsin: Fraction = 0.0
    """Dropout rate of the table of relative sinusoids."""
    p_dropres: Fraction = 0.0
    """Dropout rate of each unit's residual."""
    p_droplyr: Fraction = 0.0
    """LayerDrop: rate at which a stream skips a unit for one update."""
    e_tie: bool = False
    """Use the input embeddings as output embeddings."""
    e_norm: bool = True
    """RMSNorm before the output embeddings."""
    e_scale: NonNegativeFloat = 1.0
    """Factor on the logits. Tied embeddings, of variance 1, need about d_model ** -0.5 or less."""
    c_beta: NonNegativeFloat = 1e-4
    """Weight of the commit loss."""
    c_gamma: Fraction = 0.99
    """Decay of the codebook's moving average, per update."""
    c_revive: Fraction = 0.0
    """After each update, a code whose moving average is below this share of its head's mean moves next to a code that
    stands for too many keys, and they divide its keys; 0: never. 0.1 keeps nearly all codes in use."""
    is_train: bool = False
    """Whether dropout is on. The mode decides, so it is not in config files."""

    @property
    def n_key_head(self) -> int:
        """H: heads of keys and values, each with its codebook."""
        return 1 if self.head_type == "mqa" else self.n_head

    @property
    def value_names(self) -> tuple[str, str]:
        """Names of the axes H and V of values: with one key head they are not split along with the query heads."""
        return "key_heads", "shared_value" if self.head_type == "mqa" else "value"

    @property
    def attention_units(self) -> tuple[str, ...]:
        """Names of a layer's units that have attention, and so have a state."""
        return UNITS if self.head_type == "shga" else UNITS[:1]

    @property
    def hidden_width(self) -> int:
        """The width of the MLP, a multiple of 128 (a TPU's tile) unless `d_ff` gives it."""
        if self.d_ff:
            return self.d_ff
        two_gated_units = 2 * (3 * self.d_k + 3 * 2 * self.d_model)  # queries, keys, biases; values, gate, output
        attention = self.n_head * (self.d_k + self.d_v) + self.n_key_head * (2 * self.d_k + self.d_v)
        return max(1, round((two_gated_units - attention) / 2 / 128)) * 128

    def replace(self, **changes) -> "TransformerConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
