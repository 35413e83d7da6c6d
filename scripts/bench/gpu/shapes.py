"""The models that are measured, at full size and as small as the device in software needs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Training:
    """A run: the recipe that it comes from, the keys of `[model]`, and the size of a step."""

    recipe: str
    model: dict
    batch: int
    sequence: int
    accumulation: int = 1
    # Of a synthetic checkpoint: "bf16" or "int4".
    checkpoint: str | None = None
    vocab_size: int = 8192


# As in `bench_decoding`: the first dense layer and the first layer of experts, with a small vocabulary.
BLOCK = {
    "preset": "moonlight-16b-a3b",
    "num_hidden_layers": 2,
    "vocab_size": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TINY_BLOCK = BLOCK | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

FULL = {
    "bench-small, f32": Training("quickstart.toml", {"preset": "bench-small", "dtype": "f32"}, 8, 1024),
    "bench-small, bf16": Training("quickstart.toml", {"preset": "bench-small", "dtype": "bf16"}, 8, 1024),
    "one block of Moonlight, bf16": Training("quickstart.toml", BLOCK | {"dtype": "bf16"}, 4, 2048),
    "Moonlight-16B, LoRA, int4": Training("moonlight-16b-lora-24gb.toml", {}, 1, 2048, 4, "int4", 163_840),
    "Moonlight-16B, all parameters": Training("moonlight-16b-sft-80gb.toml", {}, 1, 4096, 1, "bf16", 163_840),
}
TINY = {
    "bench-small, f32": Training("quickstart.toml", TINY_BLOCK | {"dtype": "f32"}, 2, 32, vocab_size=256),
    "bench-small, bf16": Training("quickstart.toml", TINY_BLOCK | {"dtype": "bf16"}, 2, 32, vocab_size=256),
    "one block of Moonlight, bf16": Training("quickstart.toml", TINY_BLOCK | {"dtype": "bf16"}, 1, 64, vocab_size=256),
    "Moonlight-16B, LoRA, int4": Training("moonlight-16b-lora-24gb.toml", {}, 1, 32, 2, "int4", 40_960),
    "Moonlight-16B, all parameters": Training("moonlight-16b-sft-80gb.toml", {}, 1, 32, 1, "bf16", 1280),
}

# Options of `synthetic_checkpoint`, and the bytes that it writes.
CHECKPOINTS = {
    False: {"int4": (["--quantize", "int4"], 10e9), "bf16": ([], 32e9)},
    True: {
        # Integers of 4 bits need widths that are multiples of 32.
        "int4": (["--layers", "2", "--scale", "4", "--quantize", "int4"], 1e8),
        "bf16": (["--layers", "2", "--scale", "128"], 1e8),
    },
}
