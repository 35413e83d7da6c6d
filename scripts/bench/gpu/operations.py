"""Floating-point operations of a model of latent attention and experts, from its shape in the keys of `config.json`."""


def layer(shape, experts):
    """Multiplications and additions of a token in the projections of one layer, forward."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    nope, rope, value = shape["qk_nope_head_dim"], shape["qk_rope_head_dim"], shape["v_head_dim"]
    latent = shape["kv_lora_rank"]
    weights = hidden * heads * (nope + rope) + hidden * (latent + rope)
    weights += latent * heads * (nope + value) + heads * value * hidden
    if experts:
        visited = shape["num_experts_per_tok"] + shape["n_shared_experts"]
        weights += hidden * shape["n_routed_experts"] + 3 * visited * hidden * shape["moe_intermediate_size"]
    else:
        weights += 3 * hidden * shape["intermediate_size"]
    return 2 * weights


def attention(shape, sequence):
    """Operations of a token in scores and their product with the values, forward, for the causal half alone."""
    width = shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"] + shape["v_head_dim"]
    return shape["num_attention_heads"] * width * (sequence + 1)


def block(shape, sequence):
    """Operations of a token in one layer of experts, forward. The backward pass has twice as many."""
    return layer(shape, experts=True) + attention(shape, sequence)


def model(shape, sequence):
    """Operations of a token in the complete model with its head, forward."""
    dense, layers = shape["first_k_dense_replace"], shape["num_hidden_layers"]
    total = dense * layer(shape, experts=False) + (layers - dense) * layer(shape, experts=True)
    return total + layers * attention(shape, sequence) + 2 * shape["hidden_size"] * shape["vocab_size"]
