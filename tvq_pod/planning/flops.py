"""The FLOPs of a model, counted from its settings: the measure for MFU."""

from tvq_pod.config.model import TransformerConfig


def forward_flops_per_token(config: TransformerConfig, update_len: int) -> int:
    """The operations (a multiply-add is two) of the matmuls that the forward pass needs for one token.

    A query meets the M + L keys of its window and block (including the masked half of the block, since dense blocks are
    computed) and S codes, whatever the length of the document: the cost of a token does not depend on T, `update_len`.
    With attn_type full it does: a query meets the window and, on average, half of the update.
    """
    c, n_key_head = config, config.n_key_head
    n_gates = c.n_head if c.head_type == "shga" else 0
    # q, output, gate; k, v
    projections = c.d_model * (c.n_head * (c.d_k + c.d_v) + n_gates * c.d_v + n_key_head * (c.d_k + c.d_v))
    keys_met = c.mem_len + (update_len // 2 if c.attn_type == "full" else c.block_len)
    window = c.n_head * (keys_met * (c.d_k + c.d_v) + (c.mem_len + 1) * c.d_k)  # content, values; relative bias
    read_cache = c.n_head * c.n_code * (c.d_k + c.d_v) if c.agg_cache and c.attn_type == "vq" else 0
    attention = projections + window + read_cache + sum(_without_two_gradients(c))
    mlp = 2 * c.d_model * c.hidden_width if c.head_type != "shga" else 0
    n_attention = len(c.attention_units)
    return 2 * (c.n_layer * (n_attention * attention + mlp) + c.d_model * c.n_vocab)


def _without_two_gradients(config: TransformerConfig) -> tuple[int, int]:
    """The multiply-adds of an attention unit for one token in two matmuls: the one without any matmul in the backward
    pass, since the nearest code has no gradient, and the one with a single one, since sums of the cache have a gradient
    only by the values."""
    c = config
    if c.attn_type == "full":
        return 0, 0
    return c.n_key_head * c.n_code * c.d_k, c.n_key_head * c.n_code * c.d_v * c.agg_cache


def train_flops(config: TransformerConfig, tokens: int, update_len: int) -> int:
    """The operations of a training step over `tokens`: the backward pass has two matmuls for each forward matmul that
    has gradients by both operands. Operations that are repeated to save memory are counted once."""
    none, one = (2 * config.n_layer * len(config.attention_units) * n for n in _without_two_gradients(config))
    return tokens * (3 * forward_flops_per_token(config, update_len) - 2 * none - one)
