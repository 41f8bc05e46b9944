"""How much arithmetic a model needs, counted from its settings: the measure that MFU is taken by."""

from tvq_pod.nn.types import TransformerConfig


def forward_flops_per_token(config: TransformerConfig, update_len: int) -> int:
    """Operations (a multiply-add is two) of the matmuls that the forward pass needs for one token.

    A query meets the M + L keys of its window and block (the masked half of the block included, as dense blocks are
    computed) and S codes, whatever the length of the document: the cost of a token does not depend on T, `update_len`.
    With attn_type full it does: a query meets the window and, on average, half of the update.
    """
    c = config
    projections = c.d_model * (2 * c.d_k + 3 * c.d_v)  # q, k; v, gate, output
    quantize = c.n_code * c.d_k
    window = (c.mem_len + c.block_len) * (c.d_k + c.d_v) + (c.mem_len + 1) * c.d_k  # content, values; relative bias
    cache = c.n_code * (c.d_k + c.d_v) + c.n_code * c.d_v if c.agg_cache else 0  # read; add what leaves the window
    if c.attn_type == "full":
        quantize = cache = 0
        window = (c.mem_len + update_len // 2) * (c.d_k + c.d_v) + (c.mem_len + 1) * c.d_k
    unit = c.n_head * (projections + quantize + window + cache)
    return 2 * (2 * c.n_layer * unit + c.d_model * c.n_vocab)


def _without_gradient_per_token(config: TransformerConfig) -> tuple[int, int]:
    """Operations of the forward pass whose matmul has no matmul in the backward pass, and of that which has only one:
    the nearest code has no gradient, and what is added to the cache has one by the values alone."""
    if config.attn_type == "full":
        return 0, 0
    units = 2 * config.n_layer * config.n_head
    return 2 * units * config.n_code * config.d_k, 2 * units * config.n_code * config.d_v * config.agg_cache


def train_flops(config: TransformerConfig, tokens: int, update_len: int) -> int:
    """Operations of a training step over `tokens`: the backward pass has two matmuls for each of the forward's that has
    gradients by both its operands. What is computed twice to save memory is not counted twice."""
    none, one = _without_gradient_per_token(config)
    return tokens * (3 * forward_flops_per_token(config, update_len) - 2 * none - one)
